#!/usr/bin/env python3
"""Writes `states.json`: hidden states and early logits of transformers, with the checkpoints that make.py made.

    oracle/bin/python tests/golden/states.py

    input_ids  a prompt
    hidden     the first 6 values of every token's state after the final norm
    layers     for each layer, embeddings first: the 3 best logits of the head for the state after the last token
"""

import json
from pathlib import Path

import torch
from oracle import Oracle, best

HERE = Path(__file__).resolve().parent
FOLDERS = ["gpt2", "llama", "qwen2", "gemma2"]
PROMPT = [5, 60, 7, 17, 17, 33, 4, 48, 9, 21]


def states(folder):
    model = Oracle(HERE / folder).model
    with torch.no_grad():
        hidden = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
        layers = [best(model.get_output_embeddings()(layer[0, -1]).numpy(), 3) for layer in hidden[:-1]]
    round_all = lambda values: [round(value, 5) for value in values]
    return dict(input_ids=PROMPT, hidden=[round_all(state[:6].tolist()) for state in hidden[-1][0]], layers=layers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = [f"{json.dumps(folder)}: {json.dumps(states(folder), separators=(',', ':'))}" for folder in FOLDERS]
    (HERE / "states.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
