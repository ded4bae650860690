/* The last change and its process: see last_change.c. */
#ifndef COWFS_LAST_CHANGE_H
#define COWFS_LAST_CHANGE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* Record that a process makes any request at this time (CLOCK_MONOTONIC, ns). */
void last_change_request(uint32_t pid, uint64_t now);

/* Functions for Python. */
extern PyMethodDef last_change_methods[];

#endif
