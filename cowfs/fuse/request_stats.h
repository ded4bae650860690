/* How many requests there were of each kind, and how long they took: see request_stats.c. */
#ifndef COWFS_FIGURES_H
#define COWFS_FIGURES_H

#include <stddef.h>
#include <stdint.h>

/* A request of this many bytes is passed to libfuse. */
void figures_begin(const void *request, size_t size);

/* It is answered; error: 0, or an errno, negated or not. What is no request's number is passed over. */
void figures_end(uint64_t unique, int32_t error);

/* A read is served without Python. */
void figures_read_directly(void);

/* Another session begins. */
void figures_reset(void);

extern PyMethodDef figures_methods[];

#endif
