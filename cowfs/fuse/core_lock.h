/* The core lock: one thread at a time runs Python that touches the union. See core_lock.c. */
#ifndef COWFS_CORE_LOCK_H
#define COWFS_CORE_LOCK_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

/* Before anything else here is called. */
void core_lock_init(void);

/* Wait for it without the GIL. */
void core_lock_take(void);
void core_lock_give(void);

/* Whether somebody waits for it. */
bool core_lock_wanted(void);

/* What Python calls. */
extern PyMethodDef core_lock_methods[];

#endif
