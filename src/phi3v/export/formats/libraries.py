"""nf4 and int8: the decoder's linear layers as bitsandbytes and torchao quantise them, as transformers saves them.

transformers loads the model with quantised layers, one tensor after the other, and saves it. Which layers these are is
read from the loaded model, since a name to be left out that the library does not understand is passed over silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from phi3v.export.formats import FormatOptions
from phi3v.export.formats.files import add_to_config, copy_other_files
from phi3v.model.checkpoint import checkpoint_shapes, make_weights_readable
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.quantised import decoder_linears, quantisation_of
from phi3v.train.methods.loading import load_weights

# Names are matched from their start or at their end: `vision_embed_tokens` alone would match nothing.
FLOAT_PARTS = ["lm_head", "model.vision_embed_tokens"]
SHARD_SIZE = "5GB"


def make(model: Path, folder: Path, options: FormatOptions) -> None:
    """Write the model of ``model`` to the empty ``folder``."""
    config = Phi3VConfig.from_pretrained(model)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    loaded = load_weights(
        str(model),
        dtype=dtype,
        quantization_config=_nf4(dtype) if options.format == "nf4" else _int8(),
        device_map={"": "cpu"},
    )
    loaded.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    make_weights_readable(folder)
    copy_other_files(model, folder)
    add_to_config(folder, {"quantization_config": loaded.config.quantization_config.to_dict()})
    quantisation = quantisation_of(Phi3VConfig.from_pretrained(folder), str(folder))
    assert quantisation is not None
    wanted, quantised = decoder_linears(loaded), quantisation.loaded_layers(loaded)
    if quantised != wanted or quantisation.layers(checkpoint_shapes(folder)) != wanted:
        raise RuntimeError(f"{quantisation.library} quantised other layers than the decoder's: {quantised ^ wanted}")


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=FLOAT_PARTS,
    )


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=FLOAT_PARTS)
