"""The networks of the assignment: MNIST images in, log-probabilities of the ten digits out.

Every network takes `(B, 1, 28, 28)` and returns `(B, 10)`; no convolution has a bias. ReLU works in
place: the same bits, less memory to walk through."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def conv_block(in_channels, out_channels, padding=0, dropout=0.0):
    """3×3 convolution → ReLU → BatchNorm, and Dropout where `dropout` (a probability) is above 0."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=padding, bias=False)
    layers = [convolution, nn.ReLU(inplace=True), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, nn.Dropout(dropout)) if dropout else nn.Sequential(*layers)


def conv(in_channels, out_channels, kernel_size=1):
    """A convolution alone, in a `Sequential` so that its weight is named like a block's."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size, bias=False))


class Network(nn.Module):
    """Runs its layers in the order they were set, then `log_softmax` over the ten outputs."""

    memory_format = torch.contiguous_format  # PyTorch's usual order; `create_model` sees to it

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return F.log_softmax(x.flatten(1), dim=-1)


class Model1(Network):
    """4,312 parameters: dropout in every full block, global average pooling at 5×5.

    The last block ends in BatchNorm → ReLU → Dropout on the logits. The published text gives no
    dropout rate; 0.1 reproduces its train accuracy of 88.9 %.
    """

    def __init__(self, dropout=0.1):
        super().__init__()
        self.convblock1 = conv_block(1, 8, dropout=dropout)  # 26×26
        self.convblock2 = conv_block(8, 16, dropout=dropout)  # 24×24
        self.convblock3 = conv(16, 10)
        self.pool1 = nn.MaxPool2d(2)  # 12×12
        self.convblock4 = conv_block(10, 10, dropout=dropout)  # 10×10
        self.convblock5 = conv_block(10, 10, padding=1, dropout=dropout)
        self.pool2 = nn.MaxPool2d(2)  # 5×5
        self.convblock6 = conv_block(10, 10, padding=1, dropout=dropout)
        self.gap = nn.AvgPool2d(5)  # 1×1
        self.convblock7 = conv(10, 10).extend([nn.BatchNorm2d(10), nn.ReLU(inplace=True), nn.Dropout(dropout)])


class Model2(Network):
    """7,524 parameters: no dropout, no padding, one pool, and a 2×2 convolution to the logits."""

    def __init__(self):
        super().__init__()
        self.convblock1 = conv_block(1, 8)  # 26×26
        self.convblock2 = conv_block(8, 16)  # 24×24
        self.convblock3 = conv(16, 10)
        self.pool1 = nn.MaxPool2d(2)  # 12×12
        self.convblock4 = conv_block(10, 10)  # 10×10
        self.convblock5 = conv_block(10, 16)  # 8×8
        self.convblock6 = conv_block(16, 10)  # 6×6
        self.convblock7 = conv_block(10, 10)  # 4×4
        self.convblock8 = conv_block(10, 10)  # 2×2
        self.convblock9 = conv(10, 10, kernel_size=2)  # 1×1


class Model3(Model2):
    """Model2's network; only its training differs (see `RECIPES` in `utils.py`)."""


class Model4(Network):
    """7,808 parameters: valid 3×3 convolutions, one pool, global average pooling, 1×1 to the logits.

    `before` and `after` are the widths on either side of the pool; the order is convolution →
    BatchNorm → ReLU. Every convolution but the first is *separable*: a 3×3 for each channel by
    itself, BatchNorm, and a 1×1 that mixes the channels, with far fewer weights for the same width
    (Howard et al., 2017, who have a ReLU between the two as well).
    """

    # Faster on a CPU than the usual order (a row of `benchmarks/epoch_time.csv`). Its price: on random
    # data BatchNorm's output is within 2e-5 of double precision, in the usual order within 5e-7.
    memory_format = torch.channels_last

    def __init__(self, before=(16, 16, 24), after=(32, 36, 36, 36)):
        super().__init__()
        widths, blocks = (1, *before, *after), []
        for i, o in zip(widths, widths[1:]):
            if blocks:
                depthwise = nn.Conv2d(i, i, 3, groups=i, bias=False)
                layers = [depthwise, nn.BatchNorm2d(i), nn.Conv2d(i, o, 1, bias=False)]
            else:
                layers = [nn.Conv2d(i, o, 3, bias=False)]
            blocks.append(nn.Sequential(*layers, nn.BatchNorm2d(o), nn.ReLU(inplace=True)))
        self.before = nn.Sequential(*blocks[: len(before)])
        self.pool = nn.MaxPool2d(2)
        self.after = nn.Sequential(*blocks[len(before) :])
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.logits = conv(widths[-1], 10)


class Model5(Model4):
    """4,310 parameters: Model4's layers, narrower; two parameters fewer than Model1."""

    def __init__(self):
        super().__init__(before=(14, 14, 16), after=(24, 24, 24, 20))


MODELS = {model.__name__: model for model in (Model1, Model2, Model3, Model4, Model5)}


def create_model(name):
    """A new network by name. ValueError, naming the right ones, for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name]().to(memory_format=MODELS[name].memory_format)
