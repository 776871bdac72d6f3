"""One measurement of vLLM's offline engine, within its own environment: `python engine.py JOB`; prints JSON.

Left to itself the engine keeps one core for its scheduler; on a machine of few cores it is faster with all of them.
"""

import os
import sys
from pathlib import Path

from measure import Laps, read_job, report

if __name__ == "__main__":  # the engine's own process imports this file again
    job = read_job()
    given = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(job["threads"])}
    os.environ.update(given, VLLM_CPU_KVCACHE_SPACE="2")  # GB; read when vllm is imported
    if (openmp := Path(sys.prefix, "lib", "libiomp5.so")).exists():
        os.environ["LD_PRELOAD"] = str(openmp)  # in its worker, as its manual asks for it
    from vllm import LLM, SamplingParams

    rows = len(job["prompts"]) * job["group_size"]
    engine = LLM(job["model"], dtype=job["precision"], max_model_len=1024, max_num_seqs=rows, seed=0)
    sampling = SamplingParams(n=job["group_size"], temperature=1.0, max_tokens=job["max_tokens"], logprobs=0)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    laps, tokens = Laps(job), []
    laps()
    while len(tokens) < job["steps"] and not (tokens and laps.over):
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        laps()
        tokens.append(sum(len(one.token_ids) for output in outputs for one in output.outputs))
    report(job, laps, tokens=tokens[laps.first :])
