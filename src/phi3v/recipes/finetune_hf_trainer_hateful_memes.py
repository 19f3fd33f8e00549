r"""Fine-tune on Hateful Memes with the command line of the public recipe, on one machine or several.

    torchrun --nproc_per_node=8 --nnodes=N --master_addr=A --master_port=P --node_rank=R \
        finetune_hf_trainer_hateful_memes.py --output_dir D --batch_size 64 --bf16 --use_flash_attention
"""

import sys

from phi3v.recipes.public_recipe import fine_tune

if __name__ == "__main__":
    sys.exit(fine_tune("hateful_memes"))
