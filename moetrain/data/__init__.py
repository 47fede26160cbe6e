"""Text to batches: sources, tokenizers, shards, packing, and a resumable order of samples."""

from moetrain.data.batch import IGNORE, Batch
from moetrain.data.corpus import Corpus, prepare
from moetrain.data.documents import Part
from moetrain.data.loader import TrainLoader, val_batches
from moetrain.data.order import MixtureOrder, Order, SampleOrder
from moetrain.data.packing import PackedSplit, Packing, Rows
from moetrain.data.sources import turns_source
from moetrain.data.sources.domains import fetch_domains
from moetrain.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from moetrain.data.whole import WholeFiles, whole_files

__all__ = [
    "IGNORE",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "MixtureOrder",
    "Order",
    "PackedSplit",
    "Packing",
    "Part",
    "Rows",
    "SampleOrder",
    "Tokenizer",
    "TrainLoader",
    "WholeFiles",
    "fetch_domains",
    "load_tokenizer",
    "prepare",
    "turns_source",
    "val_batches",
    "whole_files",
]
