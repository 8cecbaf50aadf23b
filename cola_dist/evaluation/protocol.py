"""What an evaluation was of: everything that determines its figures, as data that is printed and stored with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from rich.table import Table

from cola_dist import storage
from cola_dist.config import AUTOENCODERS, RunConfig
from cola_dist.data.stream import ClipReader
from cola_dist.errors import UserError
from cola_dist.evaluation.exported import export_folder
from cola_dist.evaluation.networks import NetworkFile
from cola_dist.evaluation.video import BEST_PSNR, FVD_SIDE

DEFINITIONS = 1
"""Raised whenever a figure of the same name begins to mean something else, so that no stored part of an evaluation is taken for a new one."""
ROLES = ("lam", "conditioning", "world")
"""Folders of an export that are evaluated."""
_CHUNK = 64 * 1024**2


@dataclass(frozen=True)
class Protocol:
    """Two evaluations are comparable where these agree, the export and the data apart."""

    export: str
    """SHA-256 over names and bytes of all files of the evaluated roles, their configuration included."""
    data: Mapping[str, str]
    """Source to the content hash of its shards."""
    split: str
    order: str
    """Identity of the order of clips: mixture, episodes, seed."""
    clips: tuple[str, ...]
    """``source/episode@first frame`` of each clip, in the order of the run; its place is the position that keys its noise."""
    samples: int
    """How many clips; sets are compared (FVD) over as many on each side."""
    frames: int
    """Video frames per clip."""
    context: int
    """Video frames at the start that the generator is given. Metrics but FVD leave them out."""
    rate_hz: float
    resolution: int
    resize: str
    """How stored frames become clips, and clips what FVD's network sees."""
    value_range: str
    psnr_cap: float
    """dB that a frame without error counts."""
    sampler_steps: int
    guidance: float
    seed: int
    """Of the order of clips and of the noise."""
    other_clip: str
    """Whose actions stand for "other" ones."""
    device: str
    """``cpu`` or ``cuda``: their random numbers differ."""
    precision: str
    lpips: NetworkFile | None
    fvd: NetworkFile | None
    definitions: int = DEFINITIONS

    @property
    def key(self) -> str:
        """Hash of all but which clips: the figures of a clip stay the same when others join it."""
        kept = asdict(replace(self, clips=(), samples=0))
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def make_protocol(
    uri: str, config: RunConfig, reader: ClipReader, clips: int, context: int, device: str, networks: Mapping[str, NetworkFile]
) -> Protocol:
    """The protocol of evaluating the export at ``uri`` on the first ``clips`` held-out clips of ``reader``.

    Raises ``UserError`` for clips that the models cannot take, or more than one epoch of the held-out set holds.
    """
    data, shape = config.data, AUTOENCODERS[config.autoencoder.kind]
    stride = shape.stride
    if (data.frames - 1) % stride or not 1 < data.frames <= (shape.most_frames or data.frames):
        longest = f", at most {shape.most_frames}" if shape.most_frames else ""
        raise UserError(f"--frames {data.frames}: autoencoder {config.autoencoder.kind} takes 1 + {stride} n frames{longest}, n from 1 on")
    if not 1 <= context < data.frames or (context - 1) % stride:
        raise UserError(f"--context {context}: give 1 + {stride} n frames, fewer than the clip's {data.frames}")
    _check_count(reader, clips)
    return Protocol(
        export=_export_hash(uri),
        data={folder.source: folder.content_hash for folder in reader.folders},
        split=reader.split,
        order=reader.order.hash_until(clips),
        clips=tuple(_name(reader, position) for position in range(clips)),
        samples=clips,
        frames=data.frames,
        context=context,
        rate_hz=data.rate_hz,
        resolution=data.resolution,
        resize=f"clips: area, short side to {data.resolution}, centre; FVD: bilinear without antialiasing to {FVD_SIDE} x {FVD_SIDE}",
        value_range="uint8; PSNR and SSIM see [0, 1], LPIPS and FVD [-1, 1]",
        psnr_cap=BEST_PSNR,
        sampler_steps=config.flow.sampler_steps,
        guidance=config.flow.guidance,
        seed=config.train.seed,
        other_clip="the next clip of the order that is of the same source and of another episode",
        device=device,
        precision="fp32, figures in fp64",
        lpips=networks.get("lpips"),
        fvd=networks.get("fvd"),
    )


def protocol_table(protocol: Protocol) -> Table:
    """The protocol to be read by people; of the clips the first and the last."""
    table = Table("protocol", "", title=f"protocol {protocol.key}", title_justify="left")
    for name, value in asdict(protocol).items():
        shown = f"{value[0]} … {value[-1]}" if name == "clips" else value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {item}" for key, item in value.items())
        table.add_row(name, "none" if shown is None else str(shown))
    return table


def partner_of(reader: ClipReader, position: int) -> int:
    """Position of the clip whose actions stand for other ones than those of ``position``. It depends on the order alone, not on a batch.

    The next one of the same source and another episode; where there is none of it, of the same source; else of any. Raises ``UserError`` for
    an order of one clip.
    """
    order = reader.order
    own = order.clip(position)
    window: int | None = None
    foreign: int | None = None
    for later in range(position + 1, position + 1 + 4 * order.block):
        other = order.clip(later)
        if other.source == own.source and other.episode != own.episode:
            return later
        if other.source != own.source:
            foreign = foreign or later
        elif other.start != own.start:
            window = window or later
    chosen = window or foreign
    if chosen is None:
        raise UserError(f"the held-out set holds one clip ({_name(reader, position)}): pack more episodes, or give another --mixture")
    return chosen


def _check_count(reader: ClipReader, clips: int) -> None:
    """An epoch shows every window once; clips beyond it would be counted as if they were new."""
    order, drawn = reader.order, reader.order.drawn(clips)
    for number, (source, count) in enumerate(zip(order.sources, drawn, strict=True)):
        if count > order.windows(number):
            fits = max(n for n in range(clips) if all(c <= order.windows(i) for i, c in enumerate(order.drawn(n))))
            raise UserError(
                f"--clips {clips}: {count} of them would be of source {source.name!r}, which holds {order.windows(number)} held-out clips of "
                f"{order.frames} frames: give --clips {fits} or fewer, another --mixture, or pack more episodes"
            )


def _name(reader: ClipReader, position: int) -> str:
    ref = reader.order.clip(position)
    return f"{reader.folders[ref.source].source}/{reader.episodes[ref.source][ref.episode].key}@{ref.start}"


def _export_hash(uri: str) -> str:
    folder = export_folder(uri)
    digest = hashlib.sha256()
    for name, size in storage.list_files(folder).items():
        if name.partition("/")[0] not in ROLES:
            continue
        digest.update(f"{name}\n{size}\n".encode())
        for start in range(0, size, _CHUNK):
            digest.update(storage.read_bytes(storage.join(folder, name), start, _CHUNK))
    return digest.hexdigest()
