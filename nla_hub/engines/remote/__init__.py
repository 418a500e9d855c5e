"""An AV on a vLLM server.

`engine.py` is the engine, `transport.py` its connections, `pace.py` how many requests run at a time and what ends them,
`answers.py` what an answer must hold.
"""
