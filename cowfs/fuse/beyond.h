/* Requests that pyfuse3 has no handlers for; see beyond.c. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>

/* The handle number that they come by. */
#define BEYOND (UINT64_C(1) << 60)

/* Look at a request that has come, of so many bytes; return how many it has now. */
size_t beyond_received(void *request, size_t size);

extern PyMethodDef beyond_methods[];
