"""STDiT3 against a plain reference on the same weights, and what the published checkpoint fixes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cola_dist.models.world.stdit import STDiT3

SHAPE = {"channels": 4, "patch": 2, "width": 48, "depth": 2, "heads": 4, "fps": 5}
FULL = {"channels": 4, "patch": 2, "width": 1152, "depth": 28, "heads": 16, "fps": 5}


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> STDiT3:
    torch.manual_seed(seed)
    made = STDiT3(**SHAPE)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made.to(dtype)


def plain_velocity(weights: dict[str, Tensor], x: Tensor, tau: Tensor, rows: Tensor | None = None) -> Tensor:
    """The published model's arithmetic place by place and frame by frame, in fp64: loops, one clip at a time, no fused call."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    width, heads = SHAPE["width"], SHAPE["heads"]
    head = width // heads

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def wave(value: float) -> Tensor:
        angles = torch.tensor([value * math.exp(-math.log(10_000) * i / 128) for i in range(128)], dtype=torch.float64)
        return torch.cat([angles.cos(), angles.sin()])

    def embedded(name: str, value: float) -> Tensor:
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", wave(value))))

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def attention(name: str, sequence: Tensor, temporal: bool) -> Tensor:
        """``sequence [n, width]``."""
        q, k, v = linear(f"{name}.qkv", sequence).chunk(3, -1)
        out = []
        for h in range(heads):
            part = slice(h * head, (h + 1) * head)
            qs, ks = (
                s[:, part] / (s[:, part].square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.{one}_norm.weight"]
                for one, s in (("q", q), ("k", k))
            )
            if temporal:
                qs, ks = turn(qs), turn(ks)
            scores = qs @ ks.T / math.sqrt(head)
            if temporal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            out.append(scores.softmax(-1) @ v[:, part])
        return linear(f"{name}.proj", torch.cat(out, -1))

    def turn(sequence: Tensor) -> Tensor:
        """Each pair of neighbouring features as a complex number, turned by frame times frequency."""
        pairs = torch.view_as_complex(sequence.reshape(len(sequence), head // 2, 2).contiguous())
        angles = torch.arange(len(sequence)).double()[:, None] * w["rope.freqs"]
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    def block(name: str, h: Tensor, modulation: Tensor, temporal: bool) -> Tensor:
        """``h [L, n, width]``, ``modulation [L, 6, width]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + w[f"{name}.scale_shift_table"])[:, :, None].unbind(1)
        m = norm(h) * (1 + scale1) + shift1
        if temporal:
            m = torch.stack([attention(f"{name}.attn", m[:, place], True) for place in range(m.shape[1])], 1)
        else:
            m = torch.stack([attention(f"{name}.attn", frame, False) for frame in m])
        h = h + gate1 * m
        m = norm(h) * (1 + scale2) + shift2
        return h + gate2 * linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", m), approximate="tanh"))

    def position(row: int, column: int, n_rows: int, n_columns: int, height: int, width_px: int) -> Tensor:
        scale = math.sqrt(height * width_px) / 512
        base = round(math.sqrt(n_rows * n_columns))
        parts = []
        for at, count in ((column, n_columns), (row, n_rows)):
            place = at / scale * base / count
            angles = torch.tensor([place / 10_000 ** (2 * i / (width // 2)) for i in range(width // 4)], dtype=torch.float64)
            parts += [angles.sin(), angles.cos()]
        return torch.cat(parts)

    clips = []
    for b in range(len(x)):
        clip = x[b].double()
        _, _, height, width_px = clip.shape
        n_rows, n_columns = height // 2, width_px // 2
        time = torch.stack([embedded("t_embedder", 1000 * float(t)) + embedded("fps_embedder", SHAPE["fps"]) for t in tau[b]])
        shared = linear("t_block.1", F.silu(time)).reshape(len(time), 6, width)
        if rows is not None:
            shared = shared + rows[b, :, 0].double()
        kernel = w["x_embedder.proj.weight"][:, :, 0]
        h = torch.stack(
            [
                torch.stack(
                    [
                        (kernel * frame[None, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]).sum((1, 2, 3))
                        + w["x_embedder.proj.bias"]
                        + position(r, c, n_rows, n_columns, 8 * height, 8 * width_px)
                        for r in range(n_rows)
                        for c in range(n_columns)
                    ]
                )
                for frame in clip
            ]
        )
        for i in range(SHAPE["depth"]):
            h = block(f"spatial_blocks.{i}", h, shared, temporal=False)
            h = block(f"temporal_blocks.{i}", h, shared, temporal=True)
        table = w["final_layer.scale_shift_table"] + time[:, None]
        out = linear("final_layer.linear", norm(h) * (1 + table[:, 1:]) + table[:, :1])
        frames = torch.zeros_like(clip)
        for place in range(n_rows * n_columns):
            r, c = divmod(place, n_columns)
            for dy in range(2):
                for dx in range(2):
                    first = (2 * dy + dx) * 8
                    frames[:, :, 2 * r + dy, 2 * c + dx] = -out[:, place, first : first + 4]
        clips.append(frames)
    return torch.stack(clips)


@pytest.mark.parametrize("size", [(4, 4), (4, 6), (6, 2)])
def test_it_is_the_published_arithmetic(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    x, tau = torch.randn(2, 5, 4, *size), torch.rand(2, 5)
    tau[0, :2] = 0
    rows = 0.3 * torch.randn(2, 5, 1, 6, SHAPE["width"])
    for modulation in (None, rows):
        reference = plain_velocity(model().state_dict(), x, tau, modulation)
        with torch.no_grad():
            single = model()(x, tau, modulation)
            half = model(dtype=torch.float32)
            with torch.autocast("cpu", torch.bfloat16):
                half_out = half(x, tau, modulation)
        assert single.dtype == half_out.dtype == torch.float32
        assert _error(single, reference) < 1e-5
        assert _error(half_out, reference) < 1e-2


def test_gradients_of_the_action_path_are_those_of_the_published_arithmetic() -> None:
    """What reaches the rows that actions make, through every block, causal attention and rotary positions: by autograd of the plain reference."""
    torch.manual_seed(2)
    x, tau, target = torch.randn(1, 3, 4, 4, 4), torch.rand(1, 3), torch.randn(1, 3, 4, 4, 4)
    made, gradients = model(), []
    for velocity in (lambda rows: made(x, tau, rows), lambda rows: plain_velocity(made.state_dict(), x, tau, rows)):
        rows = (0.3 * torch.ones(1, 3, 1, 6, SHAPE["width"])).requires_grad_()
        (velocity(rows) - target).square().mean().backward()
        gradients.append(rows.grad)
    assert gradients[1] is not None
    assert gradients[0] is not None
    assert all(gradients[1][:, frame].abs().max() > 0 for frame in range(3))
    assert _error(gradients[0], gradients[1].double()) < 1e-4


def _error(found: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((found.double() - reference).abs().max() / reference.abs().max())


def test_full_size_has_the_published_names_shapes_and_count() -> None:
    """28 pairs of blocks of width 1152: 1.21 B with text in the published file, 0.90 B without."""
    with torch.device("meta"):
        full = STDiT3(**FULL)
    names = {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()}
    block = {
        "scale_shift_table": (6, 1152),
        "attn.qkv.weight": (3456, 1152),
        "attn.qkv.bias": (3456,),
        "attn.q_norm.weight": (72,),
        "attn.k_norm.weight": (72,),
        "attn.proj.weight": (1152, 1152),
        "attn.proj.bias": (1152,),
        "mlp.fc1.weight": (4608, 1152),
        "mlp.fc1.bias": (4608,),
        "mlp.fc2.weight": (1152, 4608),
        "mlp.fc2.bias": (1152,),
    }
    expected = {
        "rope.freqs": (36,),
        "x_embedder.proj.weight": (1152, 4, 1, 2, 2),
        "x_embedder.proj.bias": (1152,),
        **{
            f"{name}.mlp.{index}.{kind}": ((1152, 256 if index == 0 else 1152) if kind == "weight" else (1152,))
            for name in ("t_embedder", "fps_embedder")
            for index in (0, 2)
            for kind in ("weight", "bias")
        },
        "t_block.1.weight": (6912, 1152),
        "t_block.1.bias": (6912,),
        "final_layer.scale_shift_table": (2, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
        **{f"{kind}_blocks.{i}.{name}": shape for kind in ("spatial", "temporal") for i in range(28) for name, shape in block.items()},
    }
    assert names == expected
    count = sum(parameter.numel() for parameter in full.parameters())
    text = 4096 * 1152 + 1152 + 1152 * 1152 + 1152  # the caption's two linear layers
    crossed = 56 * (4 * 1152 * 1152 + 4 * 1152)  # query, key and value, output of each cross-attention
    blocks = 56 * (12 * 1152**2 + (3 + 1 + 4 + 1) * 1152 + 6 * 1152 + 2 * 72)
    times = 2 * (256 * 1152 + 1152**2 + 2 * 1152) + 6 * (1152**2 + 1152)
    assert count == blocks + times + 16 * 1152 + 1152 + 2 * 1152 + 32 * (1152 + 1)
    assert round((count + text + crossed) / 1e9, 2) == 1.21


@pytest.mark.parametrize("frame", range(4))
def test_a_frame_changes_its_own_velocity_and_later_ones_only(frame: int) -> None:
    x, tau = torch.randn(1, 4, 4, 4, 4), torch.full((1, 4), 0.5)
    changed = x.clone()
    changed[:, frame] += 1.0
    moved = (model()(x, tau, None) - model()(changed, tau, None)).abs().amax((0, 2, 3, 4)) > 1e-6
    assert moved.tolist() == [later >= frame for later in range(4)]
