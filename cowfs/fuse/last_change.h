/* What was changed last, and by whom. See last_change.c. */
#ifndef COWFS_LAST_CHANGE_H
#define COWFS_LAST_CHANGE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* What Python calls. */
extern PyMethodDef last_change_methods[];

#endif
