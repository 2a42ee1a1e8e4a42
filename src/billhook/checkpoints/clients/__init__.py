"""Other programs that open a written checkpoint, each in a process of its own.

ask                  Ask a client's script: JSON in, JSON out, and why it failed in one line
check                Check that stock clients load a checkpoint: transformers, vLLM and llama.cpp
llamacpp             A GGUF in llama.cpp, in a process of a Python that has llama-cpp-python
llamacpp_client      Run by a Python that has llama-cpp-python and nothing of billhook: a GGUF and a request in
transformers_client  Run by a Python that has transformers and nothing of billhook: a checkpoint and a request in
vllm_client          Run by a Python that has vLLM and nothing of billhook: a checkpoint and a request in
"""
