"""Image classifiers of constant width: the ViT class of transformers, and a CNN with or without skip connections.

The two CNNs differ in one property: a block's output is added to its input, or replaces it. Both normalise before every
convolution, so that the CNN without skip connections can be trained too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class IsotropicCNNConfig(PreTrainedConfig):
    """``num_hidden_layers`` blocks on maps of ``hidden_size`` channels; ``skip``: whether each block adds to its input."""

    model_type = "lensbench-cnn"

    def __init__(
        self,
        num_channels: int = 1,
        image_size: int = 8,
        stride: int = 1,
        hidden_size: int = 64,
        intermediate_size: int = 64,
        num_hidden_layers: int = 8,
        skip: bool = True,
        **kwargs: Any,
    ):
        self.num_channels, self.image_size, self.stride = num_channels, image_size, stride
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.skip = num_hidden_layers, skip
        super().__init__(**kwargs)


class ConvolutionBlock(nn.Module):
    """``[h +] conv(relu(norm(conv(relu(norm(h))))))``, 3 x 3 (arXiv 1603.05027, full pre-activation), ``[B, d, H, W]``."""

    def __init__(self, config: IsotropicCNNConfig):
        super().__init__()
        d, width = config.hidden_size, config.intermediate_size
        # Normalised over all entries of one image: its states do not depend on the other images of a batch.
        self.norm_in, self.norm_inside = nn.GroupNorm(1, d), nn.GroupNorm(1, width)
        self.conv_in = nn.Conv2d(d, width, 3, padding=1, bias=False)
        self.conv_out = nn.Conv2d(width, d, 3, padding=1, bias=False)
        self.skip = config.skip

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The next map ``[B, d, H, W]``."""
        inside = self.conv_in(F.relu(self.norm_in(hidden_states)))
        written: Tensor = self.conv_out(F.relu(self.norm_inside(inside)))
        return hidden_states + written if self.skip else written


class IsotropicCNNForImageClassification(PreTrainedModel):
    """Stem, blocks of one width and one resolution, mean over positions, norm, head."""

    config_class = IsotropicCNNConfig
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: IsotropicCNNConfig):
        super().__init__(config)
        d, size = config.hidden_size, max(3, config.stride)
        self.stem = nn.Conv2d(
            config.num_channels, d, size, stride=config.stride, padding=(size - config.stride + 1) // 2
        )
        self.blocks = nn.ModuleList(ConvolutionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(d)
        self.classifier = nn.Linear(d, int(config.num_labels or 0))
        PreTrainedModel.post_init(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # He initialisation (arXiv 1502.01852): ReLU blocks keep the variance, with or without skip connections.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Any, ...]:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``; with ``labels`` ``[B]`` also their mean cross-entropy.

        ``hidden_states``: L+1 maps ``[B, d, H, W]``, the stem's first.
        """
        h = self.stem(pixel_values)  # (B, d, H, W)
        states = [h]
        for block in self.blocks:
            h = block(h)
            states.append(h)
        logits = self.classifier(self.norm(h.mean((2, 3))))  # (B, classes)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = ImageClassifierOutputWithNoAttention(
            loss=loss, logits=logits, hidden_states=tuple(states) if wanted else None
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


AutoConfig.register(IsotropicCNNConfig.model_type, IsotropicCNNConfig)
AutoModelForImageClassification.register(IsotropicCNNConfig, IsotropicCNNForImageClassification)


def positions_across(image_size: int) -> int:
    """Patches or map positions along one side of an image: the divisor of its size nearest to 4 (8 from 32 pixels on)."""
    wanted = 4 if image_size < 32 else 8
    return min((n for n in range(1, image_size + 1) if image_size % n == 0), key=lambda n: (abs(n - wanted), n))


def vit(
    *,
    vocab_size: int,
    channels: int,
    d_model: int,
    layers: int,
    heads: int,
    width: int,
    context: int,
    patch_size: int | None = None,
    initializer_range: float = 0.02,
) -> PreTrainedModel:
    """A ViT (LayerNorm, learned positions, class token, no dropout) for images of ``context`` x ``context`` pixels."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=context,
            patch_size=patch_size or context // positions_across(context),
            num_channels=channels,
            num_labels=vocab_size,  # type: ignore[call-arg]
            hidden_size=d_model,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=width,
            initializer_range=initializer_range,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def cnn(
    *,
    vocab_size: int,
    channels: int,
    d_model: int,
    layers: int,
    heads: int | None,
    width: int,
    context: int,
    skip: bool,
    stride: int | None = None,
) -> PreTrainedModel:
    """A CNN for images of ``context`` x ``context`` pixels, ``width`` channels inside a block."""
    del heads  # a CNN has none
    return IsotropicCNNForImageClassification(
        IsotropicCNNConfig(
            num_channels=channels,
            image_size=context,
            stride=stride or context // positions_across(context),
            num_labels=vocab_size,
            hidden_size=d_model,
            num_hidden_layers=layers,
            intermediate_size=width,
            skip=skip,
        )
    )
