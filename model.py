"""The networks of the assignment.

Each network maps images `(B, 1, 28, 28)` to log-probabilities `(B, 10)` of the ten digits. No
convolution has a bias. ReLU is in-place: the results are identical, with less memory traffic.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def conv_block(in_channels, out_channels, padding=0, dropout=0.0):
    """Return 3×3 convolution → ReLU → BatchNorm, followed by Dropout if `dropout` is positive.

    `dropout` is the probability that an activation is set to zero.
    """
    layers = [
        nn.Conv2d(in_channels, out_channels, 3, padding=padding, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(out_channels),
    ]
    if dropout > 0:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def conv(in_channels, out_channels, kernel_size=1):
    """Return a bare convolution.

    It is wrapped in `Sequential` so that its `state_dict` key has the same form as a block's.
    """
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size, bias=False))


def normalized_block(in_channels, out_channels):
    """Return 3×3 convolution → BatchNorm → ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def separable_block(in_channels, out_channels):
    """Return depthwise 3×3 convolution → BatchNorm → pointwise 1×1 convolution → BatchNorm → ReLU.

    A depthwise-separable convolution has far fewer weights than a standard one of the same width
    (MobileNet, Howard et al., 2017, arXiv:1704.04861, which also has a ReLU after the first BatchNorm).
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Network(nn.Module):
    """A network that applies its layers, each once, in the order of their definition, then `log_softmax`."""

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        x = x.flatten(1)
        return F.log_softmax(x, dim=-1)


class Model1(Network):
    """4,312 parameters: dropout in every block except convblock3, and global average pooling.

    The last block ends in BatchNorm → ReLU → Dropout on the logits. The published text gives no
    dropout rate; 0.1 reproduces its train accuracy of 88.9 %.
    """

    def __init__(self, dropout=0.1):
        super().__init__()
        self.convblock1 = conv_block(1, 8, dropout=dropout)  # 8×26×26
        self.convblock2 = conv_block(8, 16, dropout=dropout)  # 16×24×24
        self.convblock3 = conv(16, 10)  # 10×24×24
        self.pool1 = nn.MaxPool2d(2)  # 10×12×12
        self.convblock4 = conv_block(10, 10, dropout=dropout)  # 10×10×10
        self.convblock5 = conv_block(10, 10, padding=1, dropout=dropout)  # 10×10×10
        self.pool2 = nn.MaxPool2d(2)  # 10×5×5
        self.convblock6 = conv_block(10, 10, padding=1, dropout=dropout)  # 10×5×5
        self.gap = nn.AvgPool2d(5)  # 10×1×1
        self.convblock7 = nn.Sequential(
            nn.Conv2d(10, 10, 1, bias=False),  # 10×1×1
            nn.BatchNorm2d(10),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )


class Model2(Network):
    """7,524 parameters: no dropout, no padding, one pool, and a 2×2 convolution to the logits."""

    def __init__(self):
        super().__init__()
        self.convblock1 = conv_block(1, 8)  # 8×26×26
        self.convblock2 = conv_block(8, 16)  # 16×24×24
        self.convblock3 = conv(16, 10)  # 10×24×24
        self.pool1 = nn.MaxPool2d(2)  # 10×12×12
        self.convblock4 = conv_block(10, 10)  # 10×10×10
        self.convblock5 = conv_block(10, 16)  # 16×8×8
        self.convblock6 = conv_block(16, 10)  # 10×6×6
        self.convblock7 = conv_block(10, 10)  # 10×4×4
        self.convblock8 = conv_block(10, 10)  # 10×2×2
        self.convblock9 = conv(10, 10, kernel_size=2)  # 10×1×1


class Model3(Model2):
    """Model2's network; only its training differs (see `RECIPES` in `utils.py`)."""


class Model4(Network):
    """7,652 parameters: six 3×3 convolutions without padding, wider toward the end, and one pool.

    Global average pooling is followed by a 1×1 convolution to the logits.
    """

    def __init__(self):
        super().__init__()
        self.block1 = normalized_block(1, 8)  # 8×26×26
        self.block2 = normalized_block(8, 8)  # 8×24×24
        self.pool = nn.MaxPool2d(2)  # 8×12×12
        self.block3 = normalized_block(8, 12)  # 12×10×10
        self.block4 = normalized_block(12, 14)  # 14×8×8
        self.block5 = normalized_block(14, 16)  # 16×6×6
        self.block6 = normalized_block(16, 16)  # 16×4×4
        self.gap = nn.AdaptiveAvgPool2d(1)  # 16×1×1
        self.logits = conv(16, 10)  # 10×1×1


class Model5(Network):
    """4,296 parameters, fewer than Model1: depthwise-separable blocks without padding, and one pool."""

    def __init__(self):
        super().__init__()
        self.block1 = normalized_block(1, 16)  # 16×26×26
        self.block2 = separable_block(16, 16)  # 16×24×24
        self.pool = nn.MaxPool2d(2)  # 16×12×12
        self.block3 = separable_block(16, 24)  # 24×10×10
        self.block4 = separable_block(24, 24)  # 24×8×8
        self.block5 = separable_block(24, 24)  # 24×6×6
        self.block6 = separable_block(24, 28)  # 28×4×4
        self.gap = nn.AdaptiveAvgPool2d(1)  # 28×1×1
        self.logits = conv(28, 10)  # 10×1×1
        # Faster than the default format on a CPU, but less precise: on random data BatchNorm deviates from
        # float64 by up to 5e-5, instead of 6e-7.
        self.to(memory_format=torch.channels_last)


MODELS = {
    "Model1": Model1,
    "Model2": Model2,
    "Model3": Model3,
    "Model4": Model4,
    "Model5": Model5,
}


def create_model(name):
    """Return a new network by name."""
    return MODELS[name]()
