"""Fixtures shared by all tests. No test may reach the network."""

from __future__ import annotations

import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import engine
from engine.executors import packed as packed_module
from engine.executors.weights import EncoderWeights
from engine.kernels import graphs
from engine.loading import save_checkpoint
from tests import tiny
from tests.captures import Others


@pytest.fixture(autouse=True)
def one_thread():
    """One thread for tiny tensors: on a busy machine, threads that wait for each other cost eightfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the graph executor runs step by step, and where it captures graphs."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
        from engine.kernels.graphs import conditional_nodes_problem

        if reason := conditional_nodes_problem():
            pytest.skip(reason)
    return request.param


@pytest.fixture
def others(monkeypatch):
    """What torch's allocator counts is what ``Others`` ask for."""
    found = Others()
    monkeypatch.setattr(graphs, "_allocations", lambda device: (found.asked, 0))
    return found


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture
def model():
    """A fresh BERT with exits at all four layers; a test may do with it what it likes."""
    return tiny.tiny_model()


@pytest.fixture(params=[True, False], ids=["first tokens first", "whole layers first"])
def first_tokens_first(request, monkeypatch):
    """Both orders of work inside a layer of the packed executor, whatever its plan would be."""
    monkeypatch.setattr(packed_module, "_SECOND_PASS_TOKENS", -1.0 if request.param else math.inf)
    return request.param


@pytest.fixture(params=["one op", "op by op"])
def way(request, monkeypatch):
    """Both ways of the packed executor, on a machine that has both; to be asked for ahead of a model's first run."""
    if request.param == "op by op":
        monkeypatch.setattr(EncoderWeights, "plan", None)
    return request.param


@pytest.fixture
def reference(model, tokenizer):
    return engine.from_module(model, tokenizer, executor="reference")


@pytest.fixture
def packed(model, tokenizer):
    return engine.from_module(model, tokenizer, executor="packed")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A checkpoint folder, to be read only; tests that damage one copy it."""
    return save_checkpoint(tiny.tiny_model(), tmp_path_factory.mktemp("checkpoint") / "bert", tokenizer)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory):
    """A Hugging Face folder of a tiny BERT with three layers, to be read only."""
    return tiny.save_backbone(tmp_path_factory.mktemp("backbone") / "bert")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """A task with train, dev and test that a tiny model learns in seconds, to be read only."""
    return tiny.write_task(tmp_path_factory.mktemp("task") / "keywords")
