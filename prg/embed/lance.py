"""Lance datasets of images, here or behind URLs, in shards of some rows."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from entry.errors import needs
from prg.embed.archives import Archive, Item, display
from prg.embed.stores import is_url
from prg.errors import DataError

SUFFIX = ".lance"
ROWS = 1 << 16
"""Of a shard, at most."""
BATCH = 64
BUFFER = 64 << 20
"""Bytes that are read before they are asked for, about."""


def is_lance(source: str) -> bool:
    """By its ending. It is a folder, and may be named as one."""
    return source.rstrip("/").lower().endswith(SUFFIX)


def open_lance(source: str, image_column: str) -> tuple[list[Archive], str]:
    """(its rows, some to each archive; a mark that changes when the dataset does).

    The rows are those of the version that is the latest now, also for who reads them later, elsewhere.
    image_column: empty: the only one. Raises DataError, PackageError.
    """
    with needs("lance"):
        import lance
    from prg.images.parquet import image_column as choose

    place = source.rstrip("/") if is_url(source) else str(Path(source))
    try:
        dataset = lance.dataset(place)
        # Not the dataset's schema, where blobs are of a type of their own.
        schema = dataset.scanner(blob_handling="all_binary").projected_schema
        files = [file.path for part in dataset.get_fragments() for file in part.metadata.files]
        count = dataset.count_rows()
    except (ValueError, OSError) as error:
        raise DataError(f"{source}: not readable as a Lance dataset ({error})") from None
    if not count:
        raise DataError(f"{source}: no images in it")
    column = choose(schema, image_column, source)
    archives = [
        Archive(
            f"{place}#{start}",
            min(ROWS, count - start),
            partial(_items, place, dataset.version, column, start),
        )
        for start in range(0, count, ROWS)
    ]
    return archives, "|".join([str(dataset.version), *files])


def _items(place: str, version: int, column: str, start: int) -> Iterator[Item]:
    """Each row by Lance's own number of it. That stays where other rows are removed."""
    import lance

    from prg.images.parquet import cell_bytes

    folder = None if is_url(place) else Path(place).parent
    row = start
    try:
        scanner = lance.dataset(place, version=version).scanner(
            columns=[column],
            offset=start,
            limit=ROWS,
            with_row_id=True,
            blob_handling="all_binary",
            batch_size=BATCH,
            io_buffer_size=BUFFER,
        )
        for batch in scanner.to_batches():
            for number, cell in zip(batch["_rowid"].to_pylist(), batch[column].to_pylist(), strict=True):
                name = f"{display(place)}#{number}"
                yield Item(name, partial(cell_bytes, cell, folder, f"{name}, column {column!r}"))
                row += 1
    except (ValueError, OSError) as error:
        raise DataError(f"{display(place)}: broken after {row} images ({error})") from None
