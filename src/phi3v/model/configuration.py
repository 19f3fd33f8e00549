"""The configuration of Phi-3-vision and Phi-3.5-vision, in the official layout.

Inside, transformers' names hold (``rope_parameters``, ``dtype``). On disk, the official ones do
(``rope_scaling`` with ``type: su``, ``rope_theta``, ``torch_dtype``), so that the official remote code, vLLM
and older versions of transformers read what we write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, Phi3Config

from phi3v.errors import UserError
from phi3v.json_files import content_of, read_json
from phi3v.processing.tokenizer import IMAGE_TOKEN, TOKEN_IDS

# CLIP ViT-L/14-336, the tower of both released models; `config.json` names it and carries no sizes.
CLIP_VIT_L_14_336: dict[str, Any] = {
    "hidden_size": 1024,
    "image_size": 336,
    "patch_size": 14,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}

# The one arrangement that was ever released, and the only one built here.
HD_EMBEDDING = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}


IMAGE_TOKEN_ID = TOKEN_IDS[IMAGE_TOKEN]


class Phi3VConfig(Phi3Config):
    """Phi-3's decoder configuration plus the vision part.

    Args:
        img_processor: ``image_dim_out`` (width of the tower's features), ``num_img_tokens`` (144 a crop), names.
        embd_layer: how crops become tokens; only the released arrangement (``HD_EMBEDDING``) is supported.
        clip_vision_config: CLIP vision fields of a tower of another size; ``None`` is CLIP ViT-L/14-336.
        image_token_id: the id of ``<|image|>``, which stands for an image in ``input_ids``; the official ids of images
            are negative, and are taken as well.

    A ``sliding_window`` that no sample can outgrow, as the released models have one, is `None` here, and the number
    again on disk. Other fields of the source, ``auto_map`` among them, are kept as read, so that the official remote
    code still finds itself.

    Raises:
        ValueError: ``embd_layer`` asks for an arrangement that was never released, or the tower's width is not
            ``image_dim_out``.
    """

    model_type = "phi3_v"

    img_processor: dict | None = None  # type: ignore[type-arg]
    embd_layer: dict | None = None  # type: ignore[type-arg]
    clip_vision_config: dict | None = None  # type: ignore[type-arg]
    image_token_id: int | None = IMAGE_TOKEN_ID
    auto_map: dict | None = None  # type: ignore[type-arg]
    sliding_window: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        rope_scaling = kwargs.get("rope_scaling") or {}
        # How the source spells it: "su" is the official name of what transformers calls "longrope".
        self._official_rope_type = rope_scaling.get("type") or rope_scaling.get("rope_type") or "su"
        # A name on disk only: it says which kernels the authors used, and would demand flash-attn of everyone.
        kwargs.pop("_attn_implementation", None)
        super().__post_init__(**kwargs)
        self.auto_map = self.auto_map or {}  # trainers look into it
        # Caches and masks that know no windows are for models without one.
        self._official_sliding_window = self.sliding_window
        if self.sliding_window is not None and self.sliding_window >= self.max_position_embeddings:
            self.sliding_window = None
        clip = self.clip_vision_config or CLIP_VIT_L_14_336
        if self.img_processor is None:
            self.img_processor = {
                "image_dim_out": clip["hidden_size"],
                "model_name": "openai/clip-vit-large-patch14-336",
                "name": "clip_vision_model",
                "num_img_tokens": 144,
            }
        if self.embd_layer is None:
            self.embd_layer = dict(HD_EMBEDDING)
        for key, value in HD_EMBEDDING.items():
            if self.embd_layer.get(key, value) != value:
                raise ValueError(f"embd_layer.{key} is {self.embd_layer[key]!r}; only {value!r} is supported")
        if self.img_processor.get("image_dim_out", clip["hidden_size"]) != clip["hidden_size"]:
            raise ValueError(
                f"img_processor.image_dim_out is {self.img_processor['image_dim_out']}, but the vision tower is "
                f"{clip['hidden_size']} wide (clip_vision_config.hidden_size)"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The configuration in a folder or on the hub; arguments as of ``PretrainedConfig.from_pretrained``.

        Raises:
            UserError: ``config.json`` of a folder is damaged, or another model's.
        """
        file = Path(pretrained_model_name_or_path) / "config.json"
        if not file.is_file():
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if (kind := read_json(file).get("model_type")) != cls.model_type:
            what = f"is a {kind!r} model; only {cls.model_type!r} can be used"
            raise UserError(what, where=str(file), hint="copy it again, or make a model with `phi3v model init`")
        with content_of(file):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def vision_config(self) -> CLIPVisionConfig:
        """The tower's configuration as transformers' CLIP blocks want it."""
        # The tower is dense and unmasked, so SDPA picks the fastest kernel by itself on every device.
        return CLIPVisionConfig(**(self.clip_vision_config or CLIP_VIT_L_14_336), attn_implementation="sdpa")

    @property
    def long_context_start(self) -> int:
        """Samples longer than this many tokens use LongRoPE's long factors."""
        return int(self.original_max_position_embeddings)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Rename ``su`` before the library looks: it adds LongRoPE's keys only to the name it knows."""
        rope = kwargs.get("rope_scaling")
        if rope and (rope.get("type") or rope.get("rope_type")) in ("su", "longrope"):
            kwargs["rope_scaling"] = {
                "rope_type": "longrope",
                "short_factor": rope["short_factor"],
                "long_factor": rope["long_factor"],
                "factor": self.max_position_embeddings / self.original_max_position_embeddings,
            }
        return super().convert_rope_params_to_dict(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        for name in ("_official_rope_type", "_official_sliding_window"):
            output.pop(name, None)
        return output

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of ``config.json``, under the official names."""
        output: dict[str, Any] = json.loads(super().to_json_string(use_diff=use_diff))
        for name in ("clip_vision_config", "auto_map"):
            if not output.get(name):
                output.pop(name, None)
        if self.sliding_window is None and self._official_sliding_window is not None:
            output["sliding_window"] = self._official_sliding_window
        rope = output.pop("rope_parameters", None) or {}
        if rope:
            output["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type") == "longrope":
            output["rope_scaling"] = {
                "long_factor": rope["long_factor"],
                "short_factor": rope["short_factor"],
                "type": self._official_rope_type,
            }
        if "dtype" in output:
            output["torch_dtype"] = output.pop("dtype")
        return json.dumps(output, indent=2, sort_keys=True) + "\n"
