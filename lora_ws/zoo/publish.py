"""Publish a collection: parquet of fixed-size lists, the paper's folders, a Hub repository."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard as HubCard
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.numpy import save_file

from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.errors import ConfigError, DataError
from lora_ws.hub import is_offline, no_answer, push_folder
from lora_ws.report.progress import progress

# Columns that an import adds anew.
_OURS = ("source", "sha256")


def write_folders(adapters: AdapterSet, out: Path) -> Path:
    """Write the paper's format: one folder per adapter, with weights and ``metadata.json``.

    Adapters stand in ``<subset>/<category>/folder_00000``.

    Raises:
        DataError: ``out`` exists.
    """
    _make(out)
    with progress("write folders", len(adapters)) as advance:
        for k, row in enumerate(adapters.rows.to_pylist()):
            folder = out / str(row.get("source") or f"adapter_{k:05d}")
            folder.mkdir(parents=True)
            vector = np.asarray(adapters.weights[k])
            tensors = {
                f"unet.{m.layer.name}.lora.{m.role}.weight": np.ascontiguousarray(
                    vector[m.columns].reshape(m.shape)
                )
                for m in adapters.layout.matrices
            }
            save_file(tensors, folder / "pytorch_lora_weights.safetensors")
            kept = {name: value for name, value in row.items() if name not in _OURS}
            (folder / "metadata.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
            advance()
    return out


def write_parquet(adapters: AdapterSet, out: Path, rows_per_file: int = 10_000) -> Path:
    """Write ``out/data/train-*.parquet``: metadata and one fixed-size list column per matrix.

    Raises:
        DataError: ``out`` exists.
    """
    _make(out)
    (out / "data").mkdir()
    count = -(-len(adapters) // rows_per_file)
    with progress("write parquet", len(adapters)) as advance:
        for k in range(count):
            part = adapters.select(slice(k * rows_per_file, (k + 1) * rows_per_file))
            table = part.rows.drop_columns([n for n in _OURS if n in part.rows.column_names])
            for matrix in adapters.layout.matrices:
                block = np.ascontiguousarray(part.weights[:, matrix.columns])
                values = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), block.shape[1])
                table = table.append_column(
                    f"unet.{matrix.layer.name}.lora.{matrix.role}.weight", values
                )
            pq.write_table(
                table,
                out / "data" / f"train-{k:05d}-of-{count:05d}.parquet",
                row_group_size=500,
                use_dictionary=False,
                compression="zstd",
            )
            advance(len(part))
    return out


def write_card(adapters: AdapterSet, out: Path, licence: str) -> Path:
    """Write ``README.md`` with the metadata that the Hub reads; returns the file."""
    recipe = dict(adapters.manifest.get("recipe", {}))
    header = {
        "license": licence,
        "pretty_name": adapters.card.title,
        "tags": ["lora", "weight-space-learning", "lora_ws"],
        "configs": [{"config_name": "default", "data_files": "data/*.parquet"}],
    }
    counts = np.unique(adapters.column(adapters.card.label).astype(str), return_counts=True)
    lines = [
        "---",
        json.dumps(header, indent=1),
        "---",
        "",
        f"# {adapters.card.name}",
        "",
        f"{adapters.card.title}: {len(adapters)} adapters of {adapters.layout.size} numbers in "
        f"{len(adapters.layout.layers)} layers, base `{adapters.card.base_model}`.",
        "",
        "| class | adapters |",
        "|---|--:|",
        *(f"| {name} | {n} |" for name, n in zip(*counts, strict=True)),
        "",
        "Columns `part` and `leaf_part` record the split: the first shares no image between parts,",
        "the second no leaf class.",
        "",
        "```python",
        "from lora_ws import import_collection",
        "",
        'adapters = import_collection("data", "zoo")',
        "```",
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(recipe, indent=1),
        "```",
        "",
    ]
    file = out / "README.md"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


class Published(NamedTuple):
    """What came of publishing: the commit, if any, and whether the Hub itself read the card."""

    commit: str | None
    validated: bool


def publish_zoo(
    adapters: AdapterSet, repo_id: str, staging: Path, licence: str, dry_run: bool
) -> Published:
    """Write parquet and card to ``staging``, and upload them where a token allows it.

    The card is parsed here, and judged by the Hub's own validator where the Hub can be reached.

    Raises:
        ConfigError: ``repo_id`` is no name of a repository, or the Hub refuses the card.
        NotAvailableError: the Hub cannot be reached, or refuses the upload.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"repo_id: expected owner/name, got `{repo_id}` ({error})") from error
    write_parquet(adapters, staging)
    validated = _validate(HubCard.load(write_card(adapters, staging, licence)), repo_id)
    if dry_run or get_token() is None:
        return Published(None, validated)
    title = f"Add {adapters.card.name}"
    return Published(push_folder(staging, repo_id, title, repo_type="dataset"), validated)


def _validate(card: HubCard, repo_id: str) -> bool:
    """Ask the Hub whether it can read a card; False if it was not there to be asked."""
    if is_offline():
        return False
    try:
        card.validate(repo_type="dataset")
    except ValueError as error:
        raise ConfigError(f"the Hub refuses the dataset card ({error}); check --licence") from error
    except Exception as error:
        no_answer(error, repo_id, None)
        return False
    return True


def _make(out: Path) -> None:
    if out.exists():
        raise DataError(f"{out} exists already; choose another place or remove it")
    out.mkdir(parents=True)
