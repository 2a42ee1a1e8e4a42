"""Other programs that open a written checkpoint, each in a process of its own.

check                A written checkpoint in clients of their own: transformers, vLLM and llama.cpp open it
llamacpp             A GGUF in llama.cpp: run by another Python, the one where llama-cpp-python is installed
llamacpp_client      Run by a Python that has llama-cpp-python and nothing of billhook: a GGUF and a request in
transformers_client  Run by a Python that has transformers and nothing of billhook: a checkpoint and a request in
vllm_client          Run by a Python that has vLLM and nothing of billhook: a checkpoint and a request in
"""
