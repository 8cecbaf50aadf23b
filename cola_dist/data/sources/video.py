"""Videos of any container that FFmpeg reads, and folders of numbered pictures: as they lie in a folder, as a table lists them, or by a preset.

What a file is decides its content, not its name. Audio is dropped, rotation is applied. Frames stand where their time stamps say.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import PurePosixPath
from typing import NamedTuple

from cola_dist import storage
from cola_dist.data.sources import Item, Skipped, SourceEpisode, Unusable, key_of
from cola_dist.data.sources.cut import CutRules, Recording, cut
from cola_dist.data.sources.footage import BEYOND_S, MAX_FPS, VIDEO_NAMES, PictureFolder, VideoFile, on_disk
from cola_dist.data.sources.presets import Preset, preset_of
from cola_dist.data.sources.tables import Row, Split, read_table
from cola_dist.errors import UserError


class _Found(NamedTuple):
    """A video below the input, or all pictures whose names begin with ``prefix``."""

    size: int
    group: str
    prefix: str = ""


class VideoOrigin:
    """Videos below ``input`` (local or object storage), whose short side becomes at most ``resolution`` pixels.

    ``preset`` is a name out of ``presets()``. ``table``, a path below ``input`` or a URI (of a folder too, if there is a preset), lists the files
    or parts of files to take; a preset's own tables are used where they lie below ``input``. ``fps`` is the rate of pictures, and overrules
    that of videos; 0 leaves it to the preset and the files. ``domain`` ("robot" or "human") counts where the preset does not know it, its licence
    where none is given. One item is one file or folder of pictures. Raises UserError.
    """

    def __init__(
        self,
        input: str,
        source: str,
        domain: str,
        resolution: int,
        rules: CutRules,
        preset: str = "",
        table: str = "",
        licence: str = "",
        fps: float = 0.0,
    ) -> None:
        known = preset_of(preset) if preset else None
        self.input, self.source, self.resolution, self.rules = input, source, resolution, rules
        self.domain = (known.domain if known else "") or domain
        if self.domain not in ("robot", "human"):
            raise UserError(f"domain {self.domain or 'missing'}: give robot or human")
        if resolution < 16:
            raise UserError(f"resolution {resolution}: give at least 16 pixels")
        if not 0 <= fps <= MAX_FPS:
            raise UserError(f"fps {fps:g}: give a frame rate up to {MAX_FPS:g}, or 0 for the files' own")
        self.licence = licence or (known.licence if known else "") or "as the original file"
        self.dataset = (known.title if known else "") or source
        self.fps = fps or (known.fps if known else 0.0)
        listing = storage.list_files(input)
        if not listing:
            raise UserError(f"{input}: no such folder, or nothing in it")
        self._pattern = ""
        self._found, everything = self._files(listing, known)
        self._rows: dict[str, list[Row]] = {}
        tables = self._tables(listing, known, table)
        if tables:
            self._take_rows(tables, known, everything, bool(table))

    def items(self) -> Sequence[Item]:
        """Every file or folder of pictures, and what a table lists without there being a file (of size 0), in the order of names."""
        names = sorted(self._rows or self._found)
        return [Item(name, self._found[name].size if name in self._found else 0) for name in names]

    def episodes(self, item: Item) -> Iterator[SourceEpisode | Skipped]:
        """Segments of a file; of the parts of it that a table lists, in the order of their beginnings."""
        rows = sorted(self._rows.get(item.name, [Row(item.name)]), key=lambda row: row.start or 0.0)
        named = {f"{item.name}#{row.id or number}" if self._rows else item.name: row for number, row in enumerate(rows)}
        if len(named) < len(rows):
            named = {f"{item.name}#{number}": row for number, row in enumerate(rows)}
        key = key_of(item.name)
        keys = [key] if len(rows) == 1 else [f"{key}-{number:05d}" for number in range(len(rows))]
        todo = deque(zip(keys, named.items(), strict=True))
        try:
            if all(row.fault for row in rows):
                raise Unusable(rows[0].fault)
            with self._opened(item.name) as reader:
                while todo:
                    key, (name, row) = todo[0]
                    yield from self._part(item.name, name, key, row, reader)
                    todo.popleft()
        except (Unusable, FileNotFoundError) as error:
            reason = str(error) if isinstance(error, Unusable) else "file missing"
            for _, (name, row) in todo:
                yield Skipped(name, row.fault or reason)

    def _part(self, file: str, name: str, key: str, row: Row, reader: VideoFile | PictureFolder) -> Iterator[SourceEpisode | Skipped]:
        if row.fault:
            yield Skipped(name, row.fault)
            return
        scale = reader.fps if row.in_frames else 1.0
        end = math.inf if row.end is None else row.end / scale
        frames = reader.between((row.start or 0.0) / scale, end)
        try:
            first = next(frames, None)
        except Unusable as error:
            yield Skipped(name, str(error))
            return
        if first is None or reader.duration + BEYOND_S < end < math.inf:
            yield Skipped(name, "times beyond the end of the file")
            return
        begin = first[0]
        provenance = {"dataset": self.dataset, "file": file} | ({"row": row.id or row.name} if self._rows else {})
        recording = Recording(
            name=name,
            key=key,
            group=row.group or self._found[file].group,
            fps=reader.fps,
            frames=((time - begin, picture) for time, picture in itertools.chain([first], frames)),
            meta={"licence": self.licence, "provenance": provenance} | ({"text": row.text} if row.text else {}),
            start_s=begin,
            split=row.split,
        )
        yield from cut(recording, self.rules)

    @contextmanager
    def _opened(self, name: str) -> Iterator[VideoFile | PictureFolder]:
        prefix = self._found[name].prefix
        if prefix:
            yield PictureFolder(self.input, prefix, re.compile(self._pattern, re.IGNORECASE), self.resolution, self.fps)
            return
        with on_disk(storage.join(self.input, name)) as path, closing(VideoFile(path, name, self.resolution, self.fps)) as reader:
            yield reader

    def _files(self, listing: Mapping[str, int], preset: Preset | None) -> tuple[dict[str, _Found], dict[str, _Found]]:
        """What is taken where no table says so, and what a table may name."""
        if preset is None:
            found = {name: _Found(size, name) for name, size in listing.items()}
            return found, found
        matching = [_matching(listing, pattern) for pattern in preset.files]
        if not any(matching):
            raise UserError(f"{self.input}: no file lies there as in {preset.title or preset.name}; give the folder that holds its videos")
        number = next(number for number, found in enumerate(matching) if found)
        self._pattern = preset.files[number]
        return matching[number], {name: found for each in reversed(matching) for name, found in each.items()}

    def _tables(self, listing: Mapping[str, int], preset: Preset | None, table: str) -> list[tuple[str, Split]]:
        """URIs of tables and the split of their rows."""
        patterns = preset.tables if preset else ()
        folder, names = self.input, list(listing)
        if table and table not in listing:
            names = list(storage.list_files(table))
            folder = table
            if not names:
                if not storage.exists(table):
                    raise UserError(f"{table}: no such table, neither below {self.input} nor as it is given")
                return [(table, next((split for pattern, split in patterns if re.search(pattern, storage.name(table), re.IGNORECASE)), ""))]
        elif table:
            names = [table]
        found = [(name, split) for pattern, split in patterns for name in names if re.search(pattern, name, re.IGNORECASE)]
        if table and not found:
            if len(names) > 1:
                raise UserError(f"{table}: none of its files is a table of {preset.title if preset else 'a preset'}; give the table itself")
            found = [(names[0], "")]
        return [(storage.join(folder, name), split) for name, split in found]

    def _take_rows(self, tables: Iterable[tuple[str, Split]], preset: Preset | None, files: dict[str, _Found], wanted: bool) -> None:
        rows: dict[str, list[Row]] = defaultdict(list)
        index = _Index(files, self.input)
        for uri, split in tables:
            for row in read_table(uri, preset.columns if preset else None, split):
                names = index.find(row.files)
                if len(names) == 1:
                    rows[names[0]].append(row)
                else:
                    fault = row.fault or ("several files of that name" if names else "file missing")
                    rows[index.plain(row.files[0]) if row.files else row.name].append(row._replace(fault=fault))
        if any(name in files for name in rows):
            self._found, self._rows = files, dict(rows)
        elif wanted:
            missing = next(iter(rows))
            raise UserError(
                f"{self.input}: none of the files that the table lists is there, such as {missing}; give the folder they are in"
            )


def _matching(listing: Mapping[str, int], pattern: str) -> dict[str, _Found]:
    """Files, or folders of pictures, whose names fit the pattern of a preset."""
    compiled = re.compile(pattern, re.IGNORECASE)
    found: dict[str, _Found] = {}
    series: dict[str, _Found] = {}
    for name, size in listing.items():
        match = compiled.search(name)
        if match is None:
            continue
        group = match.groupdict().get("group") or ""
        if "number" in compiled.groupindex:
            prefix = name[: match.start("number")]
            size += series[prefix].size if prefix in series else 0
            series[prefix] = _Found(size, group, prefix)
        else:
            found[name] = _Found(size, group or name)
    folders = [prefix.rpartition("/")[0] for prefix in series]
    for (prefix, pictures), folder in zip(series.items(), folders, strict=True):
        # Pictures alone in their folder are called by its name, others by what their names have in common too.
        name = folder if folder and folders.count(folder) == 1 else prefix.rstrip("_-. /") or "pictures"
        found[name] = pictures._replace(group=pictures.group or name)
    return found


class _Index:
    """Finds files by how a table calls them: below the input, by a part of the path, with or without its ending, or by a foreign whole path."""

    def __init__(self, names: Iterable[str], folder: str) -> None:
        self._folder = folder.rstrip("/") + "/"
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for name in names:
            path = PurePosixPath(name)
            self._by_name[path.name].append(name)
            if path.suffix.lower() in VIDEO_NAMES:
                self._by_name[path.stem].append(name)

    def plain(self, name: str) -> str:
        """A table's name for a file, relative to the input where it can be."""
        return name.replace("\\", "/").removeprefix(self._folder).removeprefix("./")

    def find(self, names: Sequence[str]) -> list[str]:
        """The files that the first of the names fits which fits any."""
        for wanted in map(self.plain, names):
            fitting = [name for name in self._by_name.get(wanted.rpartition("/")[2], ()) if self._fits(wanted, name)]
            if fitting:
                return [wanted] if wanted in fitting else fitting
        return []

    @staticmethod
    def _fits(wanted: str, name: str) -> bool:
        bare = name.rpartition(".")[0] or name
        foreign = wanted.startswith("/") or "://" in wanted or wanted[1:3] == ":/"
        return any(f"/{path}".endswith(f"/{wanted}") or (foreign and wanted.endswith(f"/{path}")) for path in (name, bare))
