"""Fine-tune on NLVR2 with the command line of the public recipe.

torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py --bf16 --use_flash_attention --batch_size 64
"""

import sys

from phi3v.recipes.public_recipe import fine_tune

if __name__ == "__main__":
    sys.exit(fine_tune("nlvr2"))
