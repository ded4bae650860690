/* The clock by which requests are timed. */
#ifndef COWFS_CLOCK_H
#define COWFS_CLOCK_H

#include <stdint.h>
#include <time.h>

/* Return the time of CLOCK_MONOTONIC in ns. */
static inline int64_t monotonic_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

#endif
