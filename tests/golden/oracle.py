"""Runs requests with transformers, refuses those that make no good record, and writes the others down."""

import copy
import json
import math
import random
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

GAP = 1e-4  # between the two best scores of a greedy step
NOISE = 2e-5  # what may happen to a logit in another order of summation
TRIES = 100


class Refused(Exception):
    """This prompt does not make a good record of the request."""


class Row:
    """What one prompt gave: tokens, processed scores and raw logits as (steps, vocabulary), the reason it ended."""

    def __init__(self, prompt, tokens, scores, logits, finish):
        self.prompt, self.tokens, self.scores, self.logits, self.finish = prompt, tokens, scores, logits, finish

    def same(self, other):
        return self.tokens == other.tokens and self.scores.shape == other.scores.shape and np.array_equal(self.scores, other.scores)


def load(folder):
    """The model in f32. Versions before 5 have another name for the type, and rotary positions under other keys."""
    config, old = AutoConfig.from_pretrained(folder), transformers.__version__ < "5"
    if old and (rope := dict(getattr(config, "rope_parameters", {}))):
        config.rope_theta = rope.pop("rope_theta")
        config.rope_scaling = None if rope["rope_type"] == "default" else rope
    dtype = {"torch_dtype" if old else "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager", **dtype).eval()


class Oracle:
    def __init__(self, folder, tokenizer=None):
        self.model = load(folder)
        self.exact = copy.deepcopy(self.model).double()
        self.tokenizer = tokenizer
        self.vocab = self.model.config.vocab_size

    def draws(self, fields):
        return bool(fields.get("do_sample", self.model.generation_config.do_sample))

    def generate(self, prompts, fields):
        """`prompts` of unequal lengths are padded on the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(**copy.deepcopy(fields), return_dict_in_generate=True, output_scores=True, output_logits=True)
        torch.manual_seed(0)
        with torch.no_grad():
            output = self.model.generate(ids, attention_mask=mask, generation_config=config, tokenizer=self.tokenizer)
        eos = self.eos(fields)
        rows = []
        for index, prompt in enumerate(prompts):
            tokens = output.sequences[index, width:].tolist()
            end = next((step + 1 for step, token in enumerate(tokens) if token in eos), len(tokens))
            stack = lambda steps: np.array([step[index].numpy() for step in steps[:end]])
            stopped = "stop_strings" in fields and end < fields.get("max_new_tokens", 0)
            finish = "eos" if tokens[end - 1] in eos else "stop_string" if stopped else "length"
            rows.append(Row(prompt, tokens[:end], stack(output.scores), stack(output.logits), finish))
        return rows

    def alone(self, prompts, fields):
        return [self.generate([prompt], fields)[0] for prompt in prompts]

    def eos(self, fields):
        eos = fields.get("eos_token_id", self.model.generation_config.eos_token_id)
        return eos if isinstance(eos, list) else [eos]

    def text(self, row, fields):
        """The generated text, and what of it is left before a stop string."""
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = [text.find(stop) for stop in fields.get("stop_strings", []) if stop in text]
        return text, text[: min(ends)] if row.finish == "stop_string" else text

    @contextmanager
    def noise(self, seed):
        """Logits as another order of summation might give them."""
        generator = torch.Generator().manual_seed(seed)
        disturb = lambda _, __, out: out + NOISE * (2 * torch.rand(out.shape, generator=generator) - 1)
        handle = self.model.get_output_embeddings().register_forward_hook(disturb)
        try:
            yield
        finally:
            handle.remove()

    def exact_logits(self, row):
        """Raw logits of every step, from one uncached pass in double precision."""
        with torch.no_grad():
            ids = torch.tensor([row.prompt + row.tokens[:-1]])
            return self.exact(ids, use_cache=False).logits[0, len(row.prompt) - 1 :].numpy()


def record(oracle, family, case):
    """The line of a case, with the first prompts that make a good record."""
    refusals = Counter()
    for attempt in range(TRIES if case.rows else 1):
        choose = random.Random(f"{family}/{case.name}/{attempt}")
        try:
            prompts = case.prompts(choose, oracle)
            fields = case.fields
            if callable(fields):
                fields = fields(greedy_path(oracle, prompts[0]), prompts[0])
            rows = checked(oracle, case, prompts, fields)
            print(f"{family}/{case.name}: prompt {attempt}", flush=True)
            return line(case, fields, rows, oracle)
        except (Refused, ValueError) as refused:  # ValueError: the oracle's own
            refusals[str(refused)] += 1
    raise SystemExit(f"{family}/{case.name}: no prompt will do: {refusals}")


def greedy_path(oracle, prompt):
    path = oracle.generate([prompt], dict(do_sample=False, max_new_tokens=16, min_new_tokens=16))[0].tokens
    if len(set(path)) < 9:
        raise Refused("dull path")
    return path


def checked(oracle, case, prompts, fields):
    rows = oracle.alone(prompts, fields)
    drawn = oracle.draws(fields)

    for row in rows:
        best = -np.sort(-row.scores, axis=1)
        gaps = best[:, 0] - best[:, 1]
        if not drawn and (gaps[~(case.ties & (gaps == 0))] < GAP).any():
            raise Refused("close call")
        if case.rows and not fields.keys() - {"max_new_tokens", "do_sample"} and len(set(row.tokens)) * 3 < len(row.tokens):
            raise Refused("dull")
        error = np.abs(row.logits - oracle.exact_logits(row)).max()
        if error > NOISE:
            raise Refused(f"far from the exact logits by 1e{math.log10(error):.0f}")
        by_hand(oracle, fields, row)

    for seed in range(4 if drawn else 1):
        with oracle.noise(seed):
            noisy = oracle.alone(prompts, fields)
        for row, again in zip(rows, noisy):
            if row.scores.shape != again.scores.shape or (np.isinf(row.scores) != np.isinf(again.scores)).any():
                raise Refused("noise moves a ban")
            if not drawn and row.tokens != again.tokens:
                raise Refused("noise moves a token")

    if case.padded:
        for row, again in zip(rows, oracle.generate(prompts, fields)):
            if row.tokens != again.tokens or np.abs(row.logits - again.logits).max() > NOISE:
                raise Refused("padding matters")

    for field in fields.keys() - {"do_sample", "max_new_tokens", "max_length", *case.idle}:
        without = {key: value for key, value in fields.items() if key != field}
        try:
            others = oracle.alone(prompts, without)
        except ValueError:
            continue  # a request that needs the field
        if all(row.same(other) for row, other in zip(rows, others)):
            raise Refused(f"{field} does nothing")
    return rows


def by_hand(oracle, fields, row):
    """Processes raw logits in a few lines of numpy, if no other field than these is set, and compares."""
    known = ["sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_new_tokens", "suppress_tokens"]
    known += ["max_new_tokens", "eos_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "renormalize_logits"]
    fields = {key: value for key, value in oracle.model.generation_config.to_diff_dict().items() if key in known} | fields
    if fields.keys() - set(known):
        return
    drawn = oracle.draws(fields)
    for step, logits in enumerate(row.logits.astype(np.float64)):
        seen, scores = row.prompt + row.tokens[:step], logits.copy()
        for ids, bias in fields.get("sequence_bias", []):
            if seen[len(seen) - len(ids) + 1 :] == ids[:-1]:
                scores[ids[-1]] += bias
        for token in set(seen):
            penalty = fields.get("repetition_penalty", 1.0)
            scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
        if (size := fields.get("no_repeat_ngram_size", 0)) and len(seen) >= size:
            for start in range(len(seen) - size + 1):
                if seen[start : start + size - 1] == seen[len(seen) - size + 1 :]:
                    scores[seen[start + size - 1]] = -np.inf
        for ids in fields.get("bad_words_ids", []):
            if seen[len(seen) - len(ids) + 1 :] == ids[:-1] and not (len(ids) == 1 and ids[0] in oracle.eos(fields)):
                scores[ids[-1]] = -np.inf
        if step < fields.get("min_new_tokens", 0):
            scores[oracle.eos(fields)] = -np.inf
        scores[fields.get("suppress_tokens", [])] = -np.inf
        if drawn:
            scores /= fields.get("temperature", 1.0)
            if top_k := fields.get("top_k", 50):
                scores[scores < np.sort(scores)[-min(top_k, len(scores))]] = -np.inf
            order = np.argsort(-scores)
            before = np.cumsum(softmax(scores)[order]) - softmax(scores)[order]
            scores[order[1:][before[1:] >= fields.get("top_p", 1.0)]] = -np.inf
            scores[softmax(scores) < fields.get("min_p", 0.0) * softmax(scores).max()] = -np.inf
        if fields.get("renormalize_logits"):
            with np.errstate(divide="ignore"):
                scores = np.log(softmax(scores))
        finite = np.isfinite(scores)
        assert (finite == np.isfinite(row.scores[step])).all(), (fields, step)
        assert np.abs(scores - row.scores[step])[finite].max() < NOISE, (fields, step)
        assert drawn or row.tokens[step] == scores.argmax(), (fields, step)


def softmax(scores):
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def line(case, fields, rows, oracle):
    out = dict(name=case.name)
    if case.texts:
        out["prompts"] = case.texts
    else:
        out["input_ids"] = [row.prompt for row in rows]
    out["generation_config"] = fields
    drawn = oracle.draws(fields)
    if not drawn:
        out["sequences"] = [row.tokens for row in rows]
        out["finish"] = [row.finish for row in rows]
    if case.texts and not drawn:
        out["texts"], out["trimmed"] = zip(*(oracle.text(row, fields) for row in rows))
    count = oracle.vocab if drawn else 6
    out["scores"] = [[score(step, count) for step in row.scores] for row in rows]
    count = oracle.vocab if case.full else 3
    out["logits"] = [[best(step, count) for step in row.logits] for row in rows]
    return json.dumps(out, separators=(",", ":"), ensure_ascii=False)


def score(values, count):
    banned = np.flatnonzero(np.isneginf(values)).tolist()
    kept = np.flatnonzero(~np.isneginf(values)).tolist()
    out = dict(top=best(values, count))
    if banned:
        out |= dict(banned=banned) if len(banned) <= len(kept) else dict(kept=kept)
    return out


def best(values, count):
    order = sorted(np.flatnonzero(np.isfinite(values)).tolist(), key=lambda id: -values[id])
    return [[id, round(float(values[id]), 5)] for id in order[:count]]
