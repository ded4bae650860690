/* Frees the memory of a ring's entries. An entry has space for 1 MiB of data, and a burst of waiting requests leaves
 * thousands of entries. Only the few entries that had large data last keep their memory, because new pages cost time.
 *
 * The kernel accesses the memory of an entry that it has only while the ring's thread is in io_uring_enter(2)
 * (IORING_SETUP_DEFER_TASKRUN): it reads the reply there, and writes the next request, which then appears in the
 * completion queue.
 */
#include "ring_internal.h"

#include <sys/mman.h>

enum {
	LARGE = 1 << 16,   /* bytes; freeing less is not worth a system call */
	KEPT = 32,         /* entries whose memory is kept, of all rings together */
	MOST_OF_RING = 16, /* the same for one ring; at least one */
};

static unsigned kept_by_ring(void)
{
	unsigned share = KEPT / ring_count;

	if (share > MOST_OF_RING)
		return MOST_OF_RING;
	return share ? share : 1;
}

void ring_memory_used(struct entry *e, size_t size)
{
	if (size <= LARGE)
		return;
	if (e->large)
		TAILQ_REMOVE(&e->ring->large, e, among_large);
	else
		e->ring->large_count++;
	e->large = true;
	TAILQ_INSERT_TAIL(&e->ring->large, e, among_large);
}

void ring_memory_drop(struct entry *e)
{
	madvise(e->payload, ring_payload, MADV_DONTNEED);
	if (e->large) {
		e->large = false;
		e->ring->large_count--;
		TAILQ_REMOVE(&e->ring->large, e, among_large);
	}
}

void ring_memory_trim(struct ring *ring)
{
	unsigned most = kept_by_ring(), head;
	struct io_uring_cqe *cqe;
	struct entry *e, *next;

	/* Replies that are not sent yet, and requests that are not seen yet, are still needed. */
	if (ring->large_count <= most || io_uring_sq_ready(&ring->uring) ||
	    IO_URING_READ_ONCE(*ring->uring.sq.kflags) & IORING_SQ_CQ_OVERFLOW)
		return;
	io_uring_for_each_cqe(&ring->uring, head, cqe)
	{
		e = (struct entry *)(uintptr_t)cqe->user_data;
		if (e)
			e->kernels = false;
	}
	for (e = TAILQ_FIRST(&ring->large); e && ring->large_count > most; e = next) {
		next = TAILQ_NEXT(e, among_large);
		if (e->kernels)
			ring_memory_drop(e);
	}
}
