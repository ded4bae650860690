/* The last change and its process: see last_change.c. */
#ifndef COWFS_LAST_CHANGE_H
#define COWFS_LAST_CHANGE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* Record that a process makes any request at this time (CLOCK_MONOTONIC, ns). */
void last_change_request(uint32_t pid, uint64_t now);

/*
 * Whether the last request is a change of the last noted inode, by the same process: 1 for a write, 2 for a mode, 4 for
 * an owner, 8 for times; 0 if that was returned before; else -1.
 */
long last_change_goes_on(void);

/* Functions for Python. */
extern PyMethodDef last_change_methods[];

#endif
