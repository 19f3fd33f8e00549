"""Fine-tune on UCF-101 with the command line of the public recipe, after `convert_ucf101.py`.

torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir D
"""

import sys

from phi3v.recipes.public_recipe import fine_tune

if __name__ == "__main__":
    sys.exit(fine_tune("ucf101"))
