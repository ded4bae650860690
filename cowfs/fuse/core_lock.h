/* The core lock: one thread at a time runs Python that touches the union. See core_lock.c. */
#ifndef COWFS_CORE_LOCK_H
#define COWFS_CORE_LOCK_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

/* Call it before all other functions here. */
void core_lock_init(void);

/* Take the core lock. Blocks, without the GIL. */
void core_lock_take(void);
void core_lock_give(void);

/* Whether a thread waits for the core lock. */
bool core_lock_wanted(void);

/* Functions for Python. */
extern PyMethodDef core_lock_methods[];

#endif
