"""A peer as a worker: peer.py NAME FOLDER f32|bf16|f32-arithmetic THREADS, in the peers' environment, which bench.py makes.

Says what it is in a line of JSON, then answers each line of a request (prompts, new, search) with a line: seconds, the seconds until
the first token where they are known, ids, and the most memory during the call. All of it whole calls with prompts of ids.
"""

import json
import os
import sys
import time
from pathlib import Path


class Transformers:
    def __init__(self, folder: str, dtype: str, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.version = f"{transformers.__version__} with torch {torch.__version__}"
        self.torch, self.transformers = torch, transformers
        self.folder, self.dtype = folder, torch.bfloat16 if dtype == "bf16" else torch.float32

    def load(self) -> None:
        key = "torch_dtype" if self.version.startswith("4") else "dtype"
        load = self.transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(self.folder, attn_implementation="sdpa", **{key: self.dtype}).eval()
        # No end token: every call runs to its end.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def call(self, prompts: list, new: int, search: str):
        torch = self.torch
        start, first = time.perf_counter(), []
        ids = torch.tensor(prompts)
        options = {
            "greedy": {},
            "beams": {"num_beams": 4},
            "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
        }[search]

        def seen(ids, scores, **_):
            first.append(time.perf_counter() - start)
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        if search == "greedy":
            options["stopping_criteria"] = self.transformers.StoppingCriteriaList([seen])
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)
        return time.perf_counter() - start, first[0] if first else None, out[:, ids.shape[1] :].tolist()


class OpenVino:
    def __init__(self, folder: str, dtype: str, threads: int):
        import numpy
        import openvino
        import openvino_genai

        self.version, self.numpy, self.openvino, self.genai = openvino_genai.__version__.split("-")[0], numpy, openvino, openvino_genai
        # The stateful graph: the paged one keeps prompts from call to call.
        self.folder, self.options = folder, {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "ATTENTION_BACKEND": "SDPA"}
        if dtype == "bf16":
            self.options["INFERENCE_PRECISION_HINT"] = "bf16"
        else:
            # Unless told, it keeps keys and values in 8 bits.
            self.options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}

    def load(self) -> None:
        self.pipeline = self.genai.LLMPipeline(self.folder, "CPU", **self.options)

    def call(self, prompts: list, new: int, search: str):
        if search == "contrastive":
            raise ValueError("no contrastive search")
        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        if search == "beams":
            config.num_beams, config.num_return_sequences = 4, 1
        start = time.perf_counter()
        ids = self.numpy.array(prompts, dtype=self.numpy.int64)
        tensors = [self.openvino.Tensor(values) for values in (ids, self.numpy.ones_like(ids))]
        result = self.pipeline.generate(self.genai.TokenizedInputs(*tensors), config)
        seconds = time.perf_counter() - start
        first = result.perf_metrics.get_ttft().mean / 1e3 if search == "greedy" else None
        return seconds, first, [list(row) for row in result.tokens]


class CTranslate2:
    def __init__(self, folder: str, dtype: str, threads: int):
        import ctranslate2

        self.version, self.ctranslate2, self.folder, self.threads = ctranslate2.__version__, ctranslate2, folder, threads
        self.type = "bfloat16" if dtype == "bf16" else "float32"
        if self.type not in ctranslate2.get_supported_compute_types("cpu"):
            raise ValueError(f"no {self.type} on this processor")

    def load(self) -> None:
        self.generator = self.ctranslate2.Generator(
            self.folder, device="cpu", compute_type=self.type, inter_threads=1, intra_threads=self.threads
        )
        self.vocabulary = json.loads(Path(self.folder, "vocabulary.json").read_text())

    def call(self, prompts: list, new: int, search: str):
        if search == "contrastive":
            raise ValueError("no contrastive search")
        tokens = [[self.vocabulary[id] for id in row] for row in prompts]
        options = {"beam_size": 4 if search == "beams" else 1, "max_length": new, "min_length": new, "end_token": []}
        start, first = time.perf_counter(), []
        if search == "greedy":
            options["callback"] = lambda _: first.append(time.perf_counter() - start)
        rows = self.generator.generate_batch(tokens, include_prompt_in_result=False, sampling_topk=1, **options)
        seconds = time.perf_counter() - start
        return seconds, first[0] if first else None, [row.sequences_ids[0] for row in rows]


class LlamaCpp:
    def __init__(self, folder: str, dtype: str, threads: int):
        import llama_cpp

        self.version, self.lib, self.file, self.threads = llama_cpp.__version__, llama_cpp, os.path.join(folder, "model.gguf"), threads
        llama_cpp.llama_backend_init()
        self.context, self.room = None, (0, 0)

    def load(self) -> None:
        self.model = self.lib.llama_model_load_from_file(self.file.encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise ValueError("the file does not load")
        self.greedy = self.lib.llama_sampler_init_greedy()

    def make_room(self, rows: int, length: int) -> None:
        """A context for rows of a length, kept from call to call while it is that large."""
        room = (rows, -(-length // 256) * 256)
        if self.context and self.room == room:
            return
        if self.context:
            self.lib.llama_free(self.context)
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_threads, params.n_threads_batch = room[0] * room[1], rows, self.threads, self.threads
        self.context, self.room, self.most = self.lib.llama_init_from_model(self.model, params), room, params.n_batch
        if not self.context:
            raise ValueError(f"no context of {room}")

    def batch(self, tokens: list):
        """A batch of (id, row, position, whether its logits are wanted)."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for at, (token, row, position, wanted) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = token, position, 1, row, wanted
        return batch

    def call(self, prompts: list, new: int, search: str):
        if search != "greedy":
            raise ValueError(f"no search of its own for {search}")
        lib, rows, length = self.lib, len(prompts), len(prompts[0])
        # Not less, so that the calls of a measure share a context.
        self.make_room(rows, length + max(new, 192))
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        tokens = [(token, row, at, at + 1 == length) for row, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
        if rows > 1 and len(tokens) > self.most:
            raise ValueError(f"{rows} prompts of {length} tokens")
        batches = [self.batch(tokens[at : at + self.most]) for at in range(0, len(tokens), self.most)]
        ends = [(row + 1) * length - 1 for row in range(rows)] if rows > 1 else [batches[-1].n_tokens - 1]
        step = self.batch([(0, row, 0, True) for row in range(rows)])
        start, first, ids = time.perf_counter(), None, [[] for _ in prompts]
        for batch in batches:
            self.decode(batch)
        while True:
            for row, end in enumerate(ends):
                ids[row].append(lib.llama_sampler_sample(self.greedy, self.context, end))
            first = first or time.perf_counter() - start
            if len(ids[0]) == new:
                break
            for row in range(rows):
                step.token[row], step.pos[row] = ids[row][-1], length + len(ids[row]) - 1
            ends = range(rows)
            self.decode(step)
        seconds = time.perf_counter() - start
        for batch in [*batches, step]:
            lib.llama_batch_free(batch)
        return seconds, first, ids

    def decode(self, batch) -> None:
        if self.lib.llama_decode(self.context, batch):
            raise ValueError("a batch that does not decode")


def memory(field: str) -> int:
    """Bytes of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024


def main() -> None:
    name, folder, dtype, threads = sys.argv[1:]
    # What libraries print is no answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict) -> None:
        print(json.dumps(answer), file=out, flush=True)

    kinds = {"openvino": OpenVino, "ctranslate2": CTranslate2, "llama.cpp": LlamaCpp}
    try:
        peer = kinds.get(name, Transformers)(folder, dtype, int(threads))
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        peer.load()
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"version": peer.version, "before": before, "peak": memory("VmHWM")})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            seconds, first, ids = peer.call(request["prompts"], request["new"], request["search"])
            if any(len(row) != request["new"] for row in ids):
                raise ValueError("a row ended early")
            say({"seconds": seconds, "first": first, "ids": ids, "peak": memory("VmHWM")})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
