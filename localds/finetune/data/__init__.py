"""From files to batches: reading, encoding, splitting and packing of training data."""

from localds.finetune.data.batch import Batch
from localds.finetune.data.batches import Batches, Stage
from localds.finetune.data.encoder import Encoder
from localds.finetune.data.errors import DataError
from localds.finetune.data.examples import Encoded, Examples
from localds.finetune.data.loading import Data, load_data
from localds.finetune.data.report import DataReport

__all__ = [
    "Batch",
    "Batches",
    "Data",
    "DataError",
    "DataReport",
    "Encoded",
    "Encoder",
    "Examples",
    "Stage",
    "load_data",
]
