"""Convert the UCF-101 subset with the command line of the public recipe.

python convert_ucf101.py --out_dir D
"""

import sys

from phi3v.recipes.public_recipe import convert_ucf101

if __name__ == "__main__":
    sys.exit(convert_ucf101())
