"""Segmenter: a timm ViT as the encoder, a mask transformer as the decoder (arXiv 2105.05633)."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import trunc_normal_
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from torch import nn
from torch.nn.functional import interpolate, normalize

Weights = Mapping[str, torch.Tensor]


class MaskTransformer(nn.Module):
    """Segmenter's decoder: patches and class embeddings attend to each other; their cosine similarities are the masks.

    The parameters have the same names as in the official code, whose state dict loads (section 3.2 of arXiv
    2105.05633).

    Args:
        num_classes: K.
        dim: D, width of the encoder's tokens and of the decoder; it has D / 64 heads.
        depth: number of transformer blocks.
        drop: dropout rate of attention, projections and MLP.
        drop_path: stochastic depth rate of the last block; it increases linearly from 0 at the first one.
    """

    def __init__(self, num_classes: int, dim: int, depth: int = 2, drop: float = 0.1, drop_path: float = 0.0):
        super().__init__()
        self.num_classes = num_classes
        rates = torch.linspace(0, drop_path, depth).tolist()
        options: dict[str, Any] = dict(qkv_bias=True, proj_drop=drop, attn_drop=drop, norm_layer=nn.LayerNorm)
        self.proj_dec = nn.Linear(dim, dim)
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, dim))
        self.blocks = nn.Sequential(*(Block(dim, max(1, dim // 64), drop_path=rate, **options) for rate in rates))
        self.decoder_norm = nn.LayerNorm(dim)
        self.proj_patch = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.proj_classes = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.mask_norm = nn.LayerNorm(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        trunc_normal_(self.cls_emb, std=0.02)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Class scores of every patch.

        Args:
            tokens: [B, rows * columns, D], from the encoder, without class and distillation tokens.
            grid: (rows, columns) of patches.

        Returns:
            [B, K, rows, columns].
        """
        classes = self.cls_emb.expand(len(tokens), -1, -1)
        tokens = self.decoder_norm(self.blocks(torch.cat([self.proj_dec(tokens), classes], 1)))
        patches, classes = tokens.split([tokens.shape[1] - self.num_classes, self.num_classes], 1)
        patches = normalize(patches @ self.proj_patch, dim=-1)
        classes = normalize(classes @ self.proj_classes, dim=-1)
        masks = self.mask_norm(patches @ classes.mT)  # over the classes, patch by patch
        return masks.mT.unflatten(2, grid)


class Segmenter(nn.Module):
    """A timm ViT followed by a `MaskTransformer`.

    Note:
        The encoder is timm's; its layer norms keep the epsilon of pre-training (1e-6; 1e-5 in the official code).
    """

    def __init__(self, encoder: VisionTransformer, decoder: MaskTransformer):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of every pixel.

        Args:
            images: float [B, 3, H, W], normalised, of the encoder's size.

        Returns:
            [B, K, H, W].
        """
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        masks = self.decoder(tokens, self.encoder.patch_embed.grid_size)
        return interpolate(masks, images.shape[-2:], mode="bilinear")


def build(
    name: str,
    num_classes: int,
    size: int,
    *,
    weights: Weights | None = None,
    drop_path: float = 0.1,
    depth: int = 2,
    drop: float = 0.1,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Segmenter:
    """A Segmenter with a timm ViT as its encoder.

    Args:
        name: name of a timm model that is a `VisionTransformer`.
        num_classes: K.
        size: side of the square windows, a multiple of the patch size.
        weights: state dict of a classifier of that name and of any input size; None: random weights.
        drop_path: stochastic depth rate of the encoder.
        depth, drop: number of blocks and dropout rate of the decoder.
        model_kwargs: further arguments of the encoder.

    Raises:
        ValueError: `name` is not such a model, `size` does not fit it, or `weights` belong to another model.
    """
    encoder = timm.create_model(name, num_classes=0, drop_path_rate=drop_path, **model_kwargs or {})
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(f"--model {name}: Segmenter needs a plain ViT; give one, such as deit_small_patch16_224")
    patch, _ = encoder.patch_embed.patch_size
    if size % patch:
        raise ValueError(f"--img-size {size}: {name} has patches of {patch} pixels; give a multiple of {patch}")
    encoder.set_input_size(img_size=(size, size))
    if weights is not None:
        load_encoder(encoder, weights)
    return Segmenter(encoder, MaskTransformer(num_classes, encoder.embed_dim, depth, drop))


def load_encoder(encoder: VisionTransformer, weights: Weights) -> None:
    """Loads a classifier's weights without its head; position embeddings are resized as in the official code.

    Raises:
        ValueError: the weights do not fit.
    """
    body = {key: value for key, value in weights.items() if not key.startswith(("head.", "head_dist."))}
    body = checkpoint_filter_fn(body, encoder, interpolation="bilinear", antialias=False)
    try:
        encoder.load_state_dict(body)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--backbone: its weights belong to another model ({reason}); give its name as --model"
        ) from error
