"""Plain PyTorch modules, written the way image libraries write them: no config, no transformers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A residual block of three convolutions; the first of a stage halves the image."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        middle = channels_out // 2
        self.conv1 = nn.Conv2d(channels_in, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or channels_in != channels_out
        self.downsample = nn.Conv2d(channels_in, channels_out, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        relued: Tensor = self.relu(out)
        return relued


class ResNet(nn.Module):
    """Stages of bottlenecks, average pooling, a classifier; images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(16, 32, 1)
        self.layer2 = self._stage(32, 64, 2)
        self.fc = nn.Linear(64, 10)

    @staticmethod
    def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Bottleneck(channels_in, channels_out, stride), Bottleneck(channels_out, channels_out, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.maxpool(self.stem(image))
        x = self.layer2(self.layer1(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.fc(x)
        return logits


class Block(nn.Module):
    """Attention and an MLP, each with a scaled residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(rows, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, width)
        x = x + self.gamma * self.proj(attended)
        mixed: Tensor = x + self.gamma * self.mlp(self.norm2(x))
        return mixed


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, blocks."""

    def __init__(self, width: int = 32, depth: int = 3, patch: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (32 // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward_features(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        normed: Tensor = self.norm(self.blocks(x + self.pos_embed))
        return normed

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.forward_features(image)[:, 0])
        return logits


@dataclass
class Denoised:
    """What the U-Net returns."""

    sample: Tensor
    skips: list[Tensor]


class Residual(nn.Module):
    """Two convolutions with the time added between."""

    def __init__(self, channels_in: int, channels_out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, channels_in), nn.Conv2d(channels_in, channels_out, 3, 1, 1)
        self.time = nn.Linear(time, channels_out)
        self.norm2, self.conv2 = nn.GroupNorm(4, channels_out), nn.Conv2d(channels_out, channels_out, 3, 1, 1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        mixed: Tensor = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return mixed


class UNet(nn.Module):
    """Down and up with skip connections; a batch is an image and the time step of each row."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.conv_in, self.conv_out = nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, 3, 3, 1, 1)
        sizes = [width, width, 2 * width]
        self.down = nn.ModuleList(Residual(a, b, width) for a, b in itertools.pairwise(sizes))
        self.mid = Residual(2 * width, 2 * width, width)
        self.up = nn.ModuleList([Residual(4 * width, width, width), Residual(2 * width, width, width)])

    def forward(self, image: Tensor, time: Tensor) -> Denoised:
        frequencies = torch.exp(-math.log(10000) * torch.arange(self.width // 2, device=image.device) / self.width)
        angles = time[:, None].float() * frequencies[None]
        embedded = torch.cat([angles.sin(), angles.cos()], dim=-1)
        h = self.conv_in(image)
        skips: list[Tensor] = []
        for down in self.down:
            h = down(h, embedded)
            skips.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.mid(h, embedded)
        for up, skip in zip(self.up, reversed(skips), strict=True):
            h = F.interpolate(h, size=skip.shape[-2:], mode="nearest")
            h = up(torch.cat([h, skip], dim=1), embedded)
        return Denoised(self.conv_out(h), skips)


class Routed(NamedTuple):
    """What the mixture of experts returns."""

    logits: Tensor
    tokens_per_expert: Tensor


class ExpertLayer(nn.Module):
    """Each token goes to its two best experts; which expert sees how many tokens depends on the data."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm(x).reshape(-1, x.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1).topk(2)
        mixed = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if rows.numel() == 0:
                continue
            mixed.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
        return x + mixed.view_as(x), torch.bincount(chosen.flatten(), minlength=len(self.experts))


class MixtureOfExperts(nn.Module):
    """Embedding, expert layers, and the count of tokens that each expert got."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.layers = nn.ModuleList(ExpertLayer(width, 4) for _ in range(depth))
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: Tensor) -> Routed:
        x = self.embed(tokens)
        counts = []
        for layer in self.layers:
            x, count = layer(x)
            counts.append(count)
        return Routed(self.head(x), torch.stack(counts))
