"""Models that use what Python and torch allow between their layers; each is run as it stands and as subgraphs."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput


class Layers(nn.Module):
    """Linear layers of width 4."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(count)])


class WritesThroughViews(Layers):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        held = x.clone()
        every_other, flat, turned = held[:, ::2], held.view(-1), held.transpose(0, 1)
        before = held.sum(-1)
        every_other.mul_(2)
        between = self.layers[0](held + flat[:1])
        turned[1:].add_(between.transpose(0, 1)[1:])
        after = every_other.sum()
        flat.sub_(1)
        return before, self.layers[1](held) + after, turned, every_other


class WritesIndexed(Layers):
    def forward(self, x: Tensor) -> Tensor:
        held = x.clone()
        first = held[0].clone()
        held[held > 1] = 0
        held[:, -1] = first.mean()
        held[..., 1:3] += self.layers[0](x)[..., :2]
        rows = torch.tensor([0, 0])
        held.index_put_((rows,), self.layers[0](held)[:1], accumulate=True)
        held[[0], :] = held[[0], :] * 2
        held.scatter_(1, torch.zeros_like(held[:, :1], dtype=torch.int64), 3.0)
        held.index_add_(0, rows, held[:1].expand(2, 4))
        held.masked_fill_(held < 0, -1).clamp_(max=2)
        return self.layers[1](held) + first


class WritesAugmented(Layers):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        same = total = x + 1
        kept = total * 1
        total += self.layers[0](y)
        total *= 2
        total[1:] -= kept[1:]
        other = total
        other = other + 1  # another tensor from here on
        other += 1
        y += 1  # the batch itself
        return {"same": same, "other": self.layers[1](other + y), "kept": kept, "y": y}


class WritesOut(Layers):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out, rows = torch.empty_like(x), torch.zeros(2, *x.shape)
        torch.add(x, 1, out=out)
        torch.mul(out, out, out=rows[1])
        kept = rows.sum(0)
        hidden = self.layers[0](rows[1])
        torch.cumsum(hidden, -1, out=out)
        torch.sub(out, 1, out=rows[0])
        return self.layers[1](out + rows[0]), kept, rows


class WritesBetweenTargets(Layers):
    """A memory that every layer reads and writes, and one that a target writes itself."""

    class Marking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            memory[-1] += x
            return self.inner(x)

    def __init__(self) -> None:
        super().__init__(0)
        self.layers = nn.ModuleList([self.Marking() for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = x.new_zeros(4, *x.shape)
        for index, layer in enumerate(self.layers):
            memory[index] = x
            x = layer(x + memory.sum(0), memory)
        return x, memory


class WritesThenBranches(Layers):
    """The branch is on what was written through views, once by the batch and once by a layer."""

    def forward(self, x: Tensor) -> Tensor:
        held = torch.zeros_like(x)
        held[:, :2] = x[:, :2]
        x = self.layers[0](x if held.sum() > 0 else -x)
        held[:, 2:] = x[:, 2:]
        return self.layers[1](x if held.sum() > 0 else x * 3)


class WritesAsked(Layers):
    """Asks an argument itself, and again when it has been written to."""

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        x = self.layers[0](x if flag else -x)
        flag.view(1).logical_not_()
        x = x * 2 if flag else x
        flag.zero_()
        return self.layers[1](x)


class WritesThenDiffers(Layers):
    """Has written to its argument and to a buffer before the first layer, which may be told to return less."""

    class Selecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.columns = nn.Linear(4, 4), 4

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[:, : self.columns].contiguous()

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Selecting() for _ in range(2)])
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        self.total += x.mean(0)
        x = self.layers[0](x)
        return self.layers[1](F.pad(x, (0, 4 - x.shape[1])) + self.total)


class WritesBuffer(Layers):
    """Counts its calls in buffers, by itself and in a layer, and branches on what the layer returns."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x) * self.calls

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Counting() for _ in range(2)])
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x = self.layers[0](x * self.calls)
        return self.layers[1](x if x.sum() > 0 else -x)


class ReadsBuffersOfLayers(Layers):
    """Reads what its layers write to themselves, before and after."""

    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return self.inner(x)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Stepping() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        before = first.steps * 2
        x = first(x)
        after, untouched = first.steps + 1, second.steps + 1
        return second(x * before) * after + before + untouched


@dataclass
class Found:
    hidden: Tensor
    names: list[str]
    inner: Pair | None = None


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class OwnOutput(ModelOutput):
    logits: Tensor | None = None
    states: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None


class Returns(Layers):
    """Returns what `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        first = self.layers[0](x)
        last = self.layers[1](first)
        match self.kind:
            case "ModelOutput":
                return OwnOutput(logits=last, states=(x, first, last))
            case "named tuple":
                return Pair(last, Pair([first, None], {"rows": x.shape[0], "x": x}))
            case "dataclass":
                return Found(last, ["a", "b"], Pair(first, x.shape[1] * 2))
            case "nested":
                return [{"b": (last, 1.5, "text", None, True), "a": [first, [first]]}, OrderedDict(z=last, y=())]
            case "size":
                return last, x.shape, list(x.shape), x.numel()
            case "namespace":
                return SimpleNamespace(hidden=last, more={"first": first, "dtype": x.dtype})
            case "cache":
                cache = DynamicCache()
                for index, state in enumerate((first, last)):
                    cache.update(state[:, None, None], x[:, None, None] + index, index)
                return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=cache)
            case _:
                return None, self.layers[0], first, last, first


class CalledTwice(nn.Module):
    """One target with other keyword arguments, sizes and ways to pass them each time."""

    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: float = 1.0, *, mode: str = "add", other: Tensor | None = None) -> Any:
            x = self.inner(x) * scale
            if other is not None:
                x = x + other if mode == "add" else x * other
            return (x, scale) if mode == "pair" else x

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Scaling()
        self.last = self.Scaling()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        y = self.block(y, 2.0, other=x)
        y = self.block(x=y[:1], mode="mul", other=x, scale=0.5)
        y, scale = self.block(torch.cat([y, x]), mode="pair")
        return self.last(y * (scale + 1))


class Tied(nn.Module):
    """One layer under two names and twice in a list, two layers with one weight, glue that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.layers.append(self.layers[0])
        self.again = self.layers[1]
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.layers[0].weight
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.twin(self.again(x)) + x @ self.twin.weight
        return self.head(x) + F.linear(x, self.embed.weight)


class ReturnsEarly(Layers):
    def forward(self, x: Tensor, limit: Tensor) -> Any:
        if x.shape[0] == 1:
            return {"single": self.layers[1](x)}
        x = self.layers[0](x)
        if (x.abs().amax() > limit).item():
            return x * 2
        for layer in self.layers:
            x = layer(x)
            if x[0, 0] > limit:
                return x, "inside"
        return x, "behind"


class LoopsOverSizes(Layers):
    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for position in range(x.shape[1]):
            state = torch.tanh(state + x[:, position])
        for row in x:
            state = state + row.mean(0)
        left, right = x.chunk(2, dim=-1)
        parts = x.split(2, dim=1)
        one, *others = x.unbind(1)
        x = self.layers[0](torch.cat([right, left], -1) + torch.stack([one, *others], 1))
        while x.shape[1] > 2:
            x = x[:, : x.shape[1] // 2]
        sizes = [part.shape[1] for part in parts]
        return self.layers[1](x + state[:, None] + len(parts) + sum(sizes) + torch.tensor(sizes).max())


class NamedLikeGlobals(Layers):
    """Arguments that hide builtins, module globals, and names that tracing itself uses."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, module: Tensor, original: Tensor, m: Tensor, f: float, target: str) -> Tensor:
            return self.linear(module + original * f) + m + len(target)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Inner() for _ in range(3)])

    def forward(
        self, input, id, type, filter, torch, F, module, original, model, batch, args, kwargs, output, getattr, m, f
    ) -> Any:
        x = input + id * type + filter - torch * F + module + original + model + batch + args + kwargs + output
        more = {"original": x, "m": m, "f": 2.0, "target": "abc"}
        x = self.layers[0](module=x, **more)
        x = self.layers[1].forward(module=x, **more)
        return {"id": id, "output": self.layers[2](x, getattr, m, f=0.5, target="")}


class Base(Layers):
    def prepared(self, x: Tensor) -> Tensor:
        return x + 1

    @classmethod
    def scaled(cls, x: Tensor) -> Tensor:
        return x * len(cls.__name__)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layers[0](self.prepared(x)) * scale


class Derived(Base):
    def prepared(self, x: Tensor) -> Tensor:
        return super().prepared(x) * 2

    @classmethod
    def scaled(cls, x: Tensor) -> Tensor:
        return super().scaled(x) + 1

    @property
    def last(self) -> nn.Module:
        return super().__getattr__("layers")[1]

    def forward(self, x: Tensor, scale: float = 3.0) -> Tensor:
        return self.last(self.scaled(super().forward(x, scale=scale)))


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def outer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return outer


def with_other_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def outer(self: nn.Module, x: Tensor, *, factor: float = 2.0, as_tuple: bool = False, **kwargs: Any) -> Any:
        result = function(self, x * factor, shift=kwargs.pop("offset"), **kwargs)
        return (result,) if as_tuple else result

    return outer


def residual(cls: type[nn.Module]) -> type[nn.Module]:
    inner = cls.forward

    @functools.wraps(inner)
    def forward(self: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        return x + inner(self, x, **kwargs)

    cls.forward = forward
    return cls


@residual
class DecoratedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    @logged
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Decorated(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoratedLayer() for _ in range(2)])

    @torch.no_grad()
    @logged
    @with_other_arguments
    def forward(self, x: Tensor, shift: Tensor, power: int = 1) -> Tensor:
        return self.layers[1](self.layers[0](x) ** power + shift)


@dataclass(frozen=True)
class Span:
    start: Tensor
    weights: dict[str, Tensor]
    label: str = "span"


@dataclass
class Prompt:
    """An argument that is an object."""

    x: Tensor
    spans: list[Span]
    scale: float = 1.0
    none: None = None


class TakesObjects(Layers):
    class Spanning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, prompt: Prompt) -> Tensor:
            return self.inner(x) * prompt.spans[1].weights["w"]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Spanning() for _ in range(2)])

    def forward(self, prompt: Prompt, *, nested: list[Any], named: Pair, nothing: Tensor | None = None) -> Any:
        assert type(prompt) is Prompt and type(named) is Pair and all(type(span) is Span for span in prompt.spans)
        x = self.layers[0](prompt.x * prompt.scale, prompt) + len(prompt.spans)
        for span in prompt.spans:
            x = x + span.start[:, None] * span.weights["w"] * len(span.label)
        for key, (one, *others) in nested[0].items():
            x = x + one * len(key) + sum(others)
        x = x + named.first - named.second["deep"][0] + (0 if nothing is None else nothing)
        return self.layers[1](x, prompt=prompt)


class TakesConstants(Layers):
    def forward(self, ids: Tensor, scale: Any) -> Any:
        scaled = ids * scale
        return self.layers[1](self.layers[0](ids * 0.5)), scaled, 1 / (scaled + scale), "one" if scale is True else 1


class TakesAnything(Layers):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            first, *others = args
            return self.linear(first) + sum(others) + sum(kwargs.values())

    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TakesAnything.Inner()

        def forward(self, *args: Any, last: Tensor, **kwargs: Any) -> Tensor:
            return self.inner(*reversed(args), last, **kwargs)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Middle() for _ in range(2)])

    def forward(self, **kwargs: Any) -> Tensor:
        x = kwargs.pop("x")
        for layer in self.layers:
            x = layer(x, *kwargs.values(), **kwargs, last=x)
        return x


class Alike(nn.Module):
    """Layers that differ in nothing but a number and a flag that each holds."""

    class Layer(nn.Module):
        def __init__(self, columns: int, pair: bool) -> None:
            super().__init__()
            self.inner, self.columns, self.pair = nn.Linear(4, 4), columns, pair

        def forward(self, x: Tensor) -> Any:
            x = self.inner(F.pad(x, (0, 4 - x.shape[1])))[:, : self.columns].contiguous()
            return (x, self.columns) if self.pair else x

    def __init__(self) -> None:
        super().__init__()
        kinds = [(4, False), (3, False), (4, True), (4, False), (2, False)]
        self.layers = nn.ModuleList([self.Layer(columns, pair) for columns, pair in kinds])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x[0] * x[1] if isinstance(x, tuple) else x
        return x


@functools.lru_cache
def table(width: int) -> Tensor:
    return torch.arange(float(width))


class Memoizing(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x) + table(4))


class Conditional(Layers):
    """Which layer runs hangs on a setting, a size, the data, an argument."""

    def __init__(self, deep: bool) -> None:
        super().__init__(6)
        self.deep = deep

    def forward(self, x: Tensor, choose: str = "none") -> Tensor:
        x = self.layers[0](x) if self.deep else x
        x = self.layers[1](x) if x.shape[1] > 3 else x * 2
        x = self.layers[2](x) if bool((x > 0).all()) else self.layers[3](-x)
        if choose != "none":
            x = self.layers[int(choose)](x)
        return self.layers[5](x)


class Comprehending(Layers):
    """Layers called in comprehensions, closures, generators, `map` and `reduce`."""

    def walked(self, x: Tensor) -> Iterator[Tensor]:
        for layer in self.layers[:2]:
            x = layer(x)
            yield x

    def forward(self, x: Tensor) -> Tensor:
        scale = 2

        def closed(layer: nn.Module) -> Callable[[Tensor], Tensor]:
            nonlocal scale
            scale += 1
            return lambda value: layer(value) * scale

        x = sum([layer(x) for layer in self.layers[:2]])
        x = functools.reduce(lambda value, layer: layer(value), self.layers, x)
        x = sum(closed(layer)(x) for layer in self.layers)
        x = torch.stack(list(map(self.layers[1], self.walked(x)))).sum(0)
        named = {name: layer(x) for name, layer in self.layers.named_children()}
        return self.layers[-1](max(named.items())[1]) + closed(self.layers[0])(x)


class Raising(Layers):
    """Draws numbers, keeps something on itself, and raises in the glue or in a target if told to."""

    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            if getattr(self.inner, "raises", False):
                raise RuntimeError("out of cheese")
            return x

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Checked() for _ in range(2)])
        self.raises = False
        self.notes: dict[str, Any] = {"seen": None}
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.notes["seen"] = self.fresh = x * 2
        self.total += 1
        x = self.layers[0](x + torch.rand(4))
        if self.raises:
            raise RuntimeError("out of cheese")
        return self.layers[1](x * self.fresh)
