"""A model behind OpenAI's HTTP API: /v1/chat/completions and /v1/completions, streamed or whole, and /v1/models.

    protocol.py    what requests may say, and what answers look like; torch-free
    worker.py      one thread that decodes all requests together
    app.py         HTTP

    dsgpt serve runs/mine --port 8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once", "max_tokens": 50}'

Trade-off: one model in one process on one device, for a team that tries its model out, a demonstration or an evaluation.
For traffic of many users, an export in an engine made for that (vLLM, SGLang, TGI) gives more tokens a second.
"""
