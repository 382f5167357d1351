# Prints a lock file without torch, its CUDA libraries and its compiler of GPU code: the CPU image takes torch's CPU build.
# A requirement begins in the first column; the lines of its hashes are indented.
/^[^ ]/ { keep = !/^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/ || /^nvidia-ml-py==/ }
keep
