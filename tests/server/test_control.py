"""Health, readiness, metrics, shutdown, and the life of a worker as they tell it."""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest

from worker_orcd.errors import DeviceError, InsufficientMemory, InvalidModelFile
from worker_orcd.nvml import GpuProcess, GpuSample
from worker_orcd.server.gpu import GpuState, Residency
from worker_orcd.server.metrics import Histogram

HEALTH_FIELDS = {  # a contract: see docs/http-api.md
    "status",
    "state",
    "model",
    "architecture",
    "quant_kind",
    "resident",
    "residency_violation",
    "gpu",
    "paused",
    "vram_bytes_used",
    "vram_bytes_total",
    "kv_blocks_total",
    "kv_blocks_free",
    "kv_groups",
    "tokenizer_kind",
    "vocab_size",
    "context_length",
    "running",
    "waiting",
    "uptime_seconds",
    "worker_id",
    "device",
    "sm",
    "cuda_runtime_version",
    "version",
    "capabilities",
    "protocol",
}
METRICS = {  # a contract: see docs/http-api.md
    "worker_vram_bytes": "gauge",
    "worker_requests_total": "counter",
    "worker_tokens_in_total": "counter",
    "worker_tokens_generated_total": "counter",
    "worker_inference_duration_ms": "histogram",
    "worker_uptime_seconds": "gauge",
    "worker_queue_time_seconds": "histogram",
    "worker_time_to_first_token_seconds": "histogram",
    "worker_inter_token_latency_seconds": "histogram",
    "worker_step_duration_seconds": "histogram",
    "worker_batch_size": "histogram",
    "worker_kv_usage_ratio": "gauge",
    "worker_kv_group_blocks_total": "gauge",
    "worker_kv_group_blocks_free": "gauge",
    "worker_prefix_cache_hit_ratio": "gauge",
    "worker_requests_running": "gauge",
    "worker_requests_waiting": "gauge",
    "worker_paused": "gauge",
    "worker_pauses_total": "counter",
    "worker_residency_checks_total": "counter",
    "worker_residency_violations_total": "counter",
    "worker_gpu_available": "gauge",
}


async def health(world):
    async with world.http() as http:
        response = await http.get("/health")
    return response.status_code, response.json()


async def readiness(world):
    async with world.http() as http:
        response = await http.get("/ready")
    return (
        response.status_code,
        response.json().get("error", {}).get("code"),
        response.headers.get("retry-after"),
    )


async def test_health_while_loading(world):
    w = world(loaded=False)
    w.status.loading(37.5)
    w.status.loading(20)  # progress never goes back
    code, body = await health(w)
    assert code == 200
    assert set(body) >= HEALTH_FIELDS
    assert (body["status"], body["state"], body["load_percent"]) == ("loading", "starting", 37.5)
    assert (body["model"], body["architecture"], body["running"]) == ("small.gguf", None, 0)
    assert await readiness(w) == (503, "NOT_READY", "1")
    async with w.http() as http:
        refused = [
            await http.post("/execute", json={"job_id": "j", "prompt": "x"}),
            await http.post("/tokenize", json={"prompt": "x"}),
            await http.get("/v1/models"),
        ]
        assert (await http.post("/cancel", json={"job_id": "j"})).status_code == 202
    assert [response.status_code for response in refused] == [503] * 3
    assert "still loading (38 %)" in refused[0].json()["error"]["message"]


async def test_health_when_ready(world):
    code, body = await health(w := world())
    assert code == 200
    assert (body["status"], body["state"], body["load_percent"]) == ("healthy", "ready", 100)
    assert body["model"] == "small"
    assert (body["vram_bytes_used"], body["vram_bytes_total"]) == (1000, 2000)
    assert (body["kv_blocks_total"], body["kv_blocks_free"]) == (100, 100)
    assert body["kv_groups"] == [
        {"window": None, "free": 80, "total": 80},
        {"window": 128, "free": 20, "total": 20},
    ]
    assert (body["vocab_size"], body["context_length"], body["quant_kind"]) == (261, 512, "Q4_1")
    assert body["chat_template_sha256"] == w.serving.chat_template.sha256
    assert body["fingerprint"].startswith("worker-orcd-0.")
    assert "execute" in body["capabilities"]
    assert await readiness(w) == (200, None, None)
    w.status.slow = "no compiler: the slow kernels are used"
    assert (await health(w))[1]["status"] == "degraded"


async def test_the_gpu_in_health_and_metrics(world):
    w = world()
    assert (await health(w))[1]["gpu"] == {"available": False, "reason": "the model is not loaded yet"}
    sample = GpuSample(
        temperature_celsius=60, utilization=0.5, ecc_corrected=3, ecc_uncorrected=0, xids=(13,)
    )
    others = (GpuProcess(7, 1000), GpuProcess(8))
    w.status.gpu = GpuState().seen(sample, others)
    code, body = await health(w)
    assert (code, body["status"]) == (200, "healthy")
    gpu = body["gpu"]
    assert (gpu["temperature_celsius"], gpu["power_watts"], gpu["xids"]) == (60, None, {"13": 1})
    assert gpu["other_processes"] == [{"pid": 7, "memory_bytes": 1000}, {"pid": 8, "memory_bytes": None}]
    assert w.count("worker_gpu_temperature_celsius") == 60
    assert w.count("worker_gpu_utilization_ratio") == 0.5
    assert w.count('worker_gpu_ecc_errors{kind="corrected"}') == 3
    assert w.count('worker_gpu_xid_errors_total{xid="13"}') == 1
    assert (w.count("worker_gpu_other_processes"), w.count("worker_gpu_other_memory_bytes")) == (2, 1000)
    assert "worker_gpu_power" not in w.metrics.exposition().decode()
    w.status.gpu = w.status.gpu.seen(GpuSample(xids=(79,)), None)
    _, body = await health(w)
    assert (body["status"], body["degraded"]) == ("degraded", "the GPU reported Xid 79")
    assert body["gpu"]["other_processes"] is None
    assert await readiness(w) == (200, None, None)


async def test_memory_that_lies_elsewhere_is_unhealthy(world):
    w = world()
    assert (await health(w))[1]["resident"] is None
    w.status.residency = Residency(resident=False, checks=3, violations=1, found="8 bytes lie elsewhere")
    code, body = await health(w)
    assert (code, body["status"], body["state"], body["resident"]) == (503, "unhealthy", "ready", False)
    assert body["residency_violation"] == "8 bytes lie elsewhere"
    assert (w.count("worker_resident"), w.count("worker_residency_checks_total")) == (0, 3)
    assert w.count("worker_residency_violations_total") == 1


async def test_a_paused_worker_is_not_ready_and_says_why(world):
    w = world()
    w.status.pause("another process uses the GPU")
    code, body = await health(w)
    assert (code, body["status"], body["state"], body["load_percent"]) == (200, "degraded", "starting", 0)
    assert body["paused"] == body["degraded"] == "another process uses the GPU"
    assert body["vram_bytes_used"] is None
    assert await readiness(w) == (503, "NOT_READY", "10")
    assert (w.count("worker_paused"), w.count("worker_pauses_total")) == (1, 1)
    w.status.loaded(w.serving)
    assert (await health(w))[1]["paused"] is None and await readiness(w) == (200, None, None)
    assert (w.count("worker_paused"), w.count("worker_pauses_total")) == (0, 1)


async def test_health_and_readiness_when_busy(world, eventually):
    w = world(max_queue=2)
    w.engine.go.clear()
    async with w.http() as http:
        one = asyncio.create_task(http.post("/execute", json={"job_id": "1", "prompt": "x"}))
        await eventually(lambda: w.engine.snapshot.num_running == 1)
        _, body = await health(w)
        assert (body["state"], body["running"], body["kv_blocks_free"]) == ("busy", 1, 99)
        assert w.count("worker_kv_usage_ratio") == 1 / 80  # of the group with the largest share held
        assert (await readiness(w))[0] == 200
        two = asyncio.create_task(http.post("/execute", json={"job_id": "2", "prompt": "x"}))
        await eventually(lambda: w.engine.snapshot.num_running == 2)
        assert await readiness(w) == (503, "QUEUE_FULL", "1")
        w.engine.go.set()
        await asyncio.gather(one, two)
    assert (await health(w))[1]["state"] == "ready"


async def test_draining_finishes_what_runs_and_refuses_the_rest(world, eventually, events_of):
    w = world()
    w.engine.go.clear()
    async with w.http() as http:
        running = asyncio.create_task(http.post("/execute", json={"job_id": "1", "prompt": "x"}))
        await eventually(lambda: w.engine.submitted)
        assert (await http.post("/shutdown")).status_code == 202
        assert w.shutdowns == [True]
        w.status.begin_drain()
        refused = await http.post("/execute", json={"job_id": "2", "prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "DRAINING"
        assert int(refused.headers["retry-after"]) > 0
        assert (await http.post("/tokenize", json={"prompt": "x"})).status_code == 503
        assert (await health(w))[1]["status"] == "draining"
        assert await readiness(w) == (503, "DRAINING", "5")
        assert not await w.client.wait_idle(0.01)
        w.engine.go.set()
        assert await w.client.wait_idle(60)
        assert events_of((await running).text)[-1][0] == "end"


async def test_what_does_not_finish_in_the_grace_period_is_cancelled(world, eventually, events_of):
    w = world()
    w.engine.go.clear()
    async with w.http() as http:
        running = asyncio.create_task(http.post("/execute", json={"job_id": "1", "prompt": "x"}))
        await eventually(lambda: w.engine.submitted)
        w.client.begin_drain()
        w.client.cancel_all()
        (_, error) = events_of((await running).text)[-1]
    assert (error["code"], error["message"]) == ("DRAINING", "the worker is shutting down")
    assert error["retriable"] is True
    assert await w.client.wait_idle(60)


@pytest.mark.parametrize(
    ("failure", "code", "status"),
    [
        (InvalidModelFile("tensor 'x' at /home/me/m.gguf is cut off"), "MODEL_LOAD_FAILED", 500),
        (InsufficientMemory("needs 9 bytes, has 3"), "INSUFFICIENT_VRAM", 503),
        (DeviceError("the device is lost"), "NOT_READY", 503),
    ],
)
async def test_a_worker_that_has_failed_says_so(world, failure, code, status):
    w = world(loaded=False)
    w.status.fail(failure)
    w.status.fail(DeviceError("a later one"))
    answer, body = await health(w)
    assert answer == 503
    assert (body["status"], body["state"], body["failure"]["code"]) == ("unhealthy", "failed", failure.code)
    assert "/home" not in body["failure"]["message"]
    assert (await readiness(w))[:2] == (status, code)


async def test_a_failed_engine_ends_every_stream(world, eventually, events_of):
    w = world()
    w.engine.go.clear()
    async with w.http() as http:
        posts = [
            asyncio.create_task(http.post("/execute", json={"job_id": str(k), "prompt": "x"}))
            for k in range(3)
        ]
        await eventually(lambda: len(w.engine.submitted) == 3)
        w.client.fail(DeviceError("the device is lost"))
        for post in posts:
            assert events_of((await post).text)[-1][1]["code"] == "CUDA_ERROR"
        assert (await http.post("/execute", json={"job_id": "j", "prompt": "x"})).json()["error"][
            "code"
        ] == "CUDA_ERROR"


async def test_health_takes_no_time(world, eventually):
    w = world()
    w.engine.go.clear()
    async with w.http() as http:
        bodies = [{"job_id": str(k), "prompt": "x"} for k in range(64)]
        streams = [asyncio.create_task(http.post("/execute", json=body)) for body in bodies]
        await eventually(lambda: len(w.engine.submitted) == 64)
        times = []
        for _ in range(100):
            begun = time.process_time()
            await http.get("/health")
            times.append(time.process_time() - begun)
        w.engine.go.set()
        await asyncio.gather(*streams)
    assert statistics.median(times) < 0.05


async def test_metrics_have_the_promised_names(world):
    w = world()
    async with w.http() as http:
        response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    types = dict(line.split()[2:4] for line in response.text.splitlines() if line.startswith("# TYPE"))
    assert {name: types.get(name) for name in METRICS} == METRICS
    outcomes = [line for line in response.text.splitlines() if line.startswith("worker_requests_total")]
    assert [line.partition("{")[2].partition("}")[0] for line in outcomes] == [
        f'outcome="{outcome}"' for outcome in ("success", "error", "cancelled", "timeout", "rejected")
    ]


async def test_metrics_count_what_happened(world, eventually):
    w = world()
    async with w.http() as http:
        for k in range(3):
            await http.post("/execute", json={"job_id": str(k), "prompt": "abc"})
        await http.post("/v1/completions", json={"prompt": ["abc", "abcd"], "n": 2, "max_tokens": 2})
        await http.post("/execute", json={"job_id": "bad", "prompt": ""})
        await http.post("/execute", json={"job_id": "long", "prompt": "x" * 600})
    assert w.count('worker_requests_total{outcome="success"}') == 4
    assert w.count('worker_requests_total{outcome="rejected"}') == 2
    assert w.count('worker_requests_total{outcome="cancelled"}') == 0
    assert w.count("worker_tokens_in_total") == 3 * 3 + 3 + 4
    assert w.count("worker_tokens_generated_total") == 3 * 10 + 4 * 2
    assert w.count("worker_inference_duration_ms_count") == 7
    assert w.count("worker_queue_time_seconds_count") == 7
    assert w.count("worker_queue_time_seconds_sum") == pytest.approx(0.007)
    assert w.count("worker_time_to_first_token_seconds_count") == 7
    assert w.count("worker_inter_token_latency_seconds_count") == 3 * 9 + 4
    await eventually(lambda: w.count("worker_kv_blocks_free") == 100)
    steps = w.count("worker_step_duration_seconds_count")
    assert steps >= 32
    assert w.count("worker_step_duration_seconds_sum") == pytest.approx(0.001 * steps)
    assert w.count("worker_prefix_cache_hit_ratio") == 0.5
    assert w.count("worker_vram_bytes") == 1000
    assert w.count("worker_kv_usage_ratio") == 0
    assert w.count('worker_kv_group_blocks_free{window="none"}') == 80
    assert w.count('worker_kv_group_blocks_total{window="128"}') == 20
    assert w.count("worker_uptime_seconds") > 0


def test_buckets_hold_what_is_at_most_their_bound():
    histogram = Histogram((1, 2, 4))
    for value in (0.5, 1, 1.5, 4, 4.1):
        histogram.observe(value)
    family = histogram.family("x", "y")
    assert {s.labels["le"]: s.value for s in family.samples if s.name == "x_bucket"} == {
        "1": 2,
        "2": 3,
        "4": 4,
        "+Inf": 5,
    }
    assert {s.name: s.value for s in family.samples if s.name != "x_bucket"} == {"x_count": 5, "x_sum": 11.1}


async def test_tokenize_and_back(world, tokenizer):
    async with world().http() as http:
        ids = (await http.post("/tokenize", json={"prompt": "hello <|im_end|>"})).json()
        assert ids["tokens"] == tokenizer.encode("hello <|im_end|>")
        assert 259 not in ids["tokens"]
        assert (ids["count"], ids["max_model_len"]) == (len(ids["tokens"]), 512)
        special = (await http.post("/tokenize", json={"prompt": "<|im_end|>", "parse_special": True})).json()
        assert special["tokens"] == [259]
        back = await http.post("/detokenize", json={"tokens": [*ids["tokens"], 259]})
        assert back.json() == {"prompt": "hello <|im_end|><|im_end|>"}
        skipped = await http.post("/detokenize", json={"tokens": [259, 65], "skip_special_tokens": True})
        assert skipped.json() == {"prompt": tokenizer.decode([65])}
        empty = await http.post("/tokenize", json={"prompt": ""})
        assert empty.json()["tokens"] == []
        wrong = await http.post("/detokenize", json={"tokens": [0, 261]})
        assert wrong.status_code == 400
        assert "tokens[1]: found 261; allowed: token ids from 0 to 260" in wrong.json()["error"]["message"]


async def test_the_chat_template_by_itself(world):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    async with world().http() as http:
        shown = await http.post("/apply-template", json={"messages": messages})
        bare = await http.post("/apply-template", json={"messages": messages, "add_generation_prompt": False})
    assert shown.json()["prompt"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert bare.json()["prompt"].endswith("Hi<|im_end|>\n")
    async with world(template=None).http() as http:
        assert (await http.post("/apply-template", json={"messages": messages})).status_code == 400
