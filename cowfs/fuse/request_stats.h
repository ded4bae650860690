/* Counts requests and measures how long they take: see request_stats.c. */
#ifndef COWFS_REQUEST_STATS_H
#define COWFS_REQUEST_STATS_H

#include <stddef.h>
#include <stdint.h>

/* Record that a request of *size* bytes is passed to libfuse. */
void request_stats_begin(const void *request, size_t size);

/* Record that a request is answered. error: 0, or an errno, negated or not. Unknown numbers are ignored. */
void request_stats_end(uint64_t unique, int32_t error);

/* Record that a read is served without Python. */
void request_stats_read_directly(void);

/* Reset for a new session. */
void request_stats_reset(void);

extern PyMethodDef request_stats_methods[];

#endif
