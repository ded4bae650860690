/* What was changed last, and by whom. See last_change.c. */
#ifndef COWFS_LAST_CHANGE_H
#define COWFS_LAST_CHANGE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* A process makes a request, whatever it is, at this time (CLOCK_MONOTONIC, ns). */
void last_change_request(uint32_t pid, uint64_t now);

/* What Python calls. */
extern PyMethodDef last_change_methods[];

#endif
