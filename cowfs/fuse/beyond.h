/* Requests that pyfuse3 has no handlers for; see beyond.c. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>

/* The handle number of these requests. */
#define BEYOND (UINT64_C(1) << 60)

/* Examine a received request of *size* bytes, and change it if necessary; return its new size. */
size_t beyond_received(void *request, size_t size);

extern PyMethodDef beyond_methods[];
