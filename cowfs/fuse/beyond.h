/* Requests that pyfuse3 has no handlers for; see beyond.c. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The handle number of these requests. */
#define BEYOND (UINT64_C(1) << 60)

/* The name in a CREATE that was a TMPFILE. */
#define NO_NAME "/"

/* Examine a received request of *size* bytes, and change it if necessary; return its new size. */
size_t beyond_received(void *request, size_t size);

/* A copy_file_range(2). */
struct beyond_copy {
	uint64_t from, from_offset, to, to_offset, length;
	bool is_64; /* the answer has 64 bits */
};

/* Whether the last request that came as a read is a copy between files that the kernel opened without a request. */
bool beyond_is_copy(struct beyond_copy *copy);

extern PyMethodDef beyond_methods[];
