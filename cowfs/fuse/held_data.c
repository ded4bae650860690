/* Limits the data of waiting writes.
 *
 * A write that must wait for a copy-up or for the disk is held in memory with its data, up to 1 MiB, for each of a
 * user's threads. So there is a limit for all users together. Except for root, no user gets more than what is left of
 * it (quotas.py has the same rule for open files). A write beyond the limit is shortened to one page: write(2) then
 * returns a smaller count, and the program writes the rest later. Writes of pages mapped with mmap(2) are not
 * shortened: the kernel treats a short write as an error there, and limits the number of such writes itself.
 */
#include "held_data.h"

#include <string.h>

#include "messages.h"

enum { WRITE_CACHE = 1 }; /* FUSE_WRITE_CACHE */
enum { PAGE = 4096, ROOTS_PART = 8, USERS = 256 };

struct write_in { /* struct fuse_write_in */
	uint64_t fh, offset;
	uint32_t size, write_flags;
	uint64_t lock_owner;
	uint32_t flags, padding;
};

enum { BEFORE_DATA = sizeof(struct in_header) + sizeof(struct write_in) };

static int64_t left, roots;
static bool by_user;
static int64_t held[USERS]; /* by uid; those that have the same remainder share */

void held_data_allow(uint64_t bytes, bool shared)
{
	left = (int64_t)bytes;
	roots = shared ? left / ROOTS_PART : 0;
	by_user = shared;
	memset(held, 0, sizeof held);
}

static bool may_hold_more(uint32_t uid)
{
	return uid && by_user ? left - roots - held[uid % USERS] > 0 : left > 0;
}

/* Whether a request is a write of more than a page by a system call. */
static bool is_long(const char *request, size_t size, struct in_header *head, struct write_in *body)
{
	if (size <= BEFORE_DATA + PAGE)
		return false;
	memcpy(head, request, sizeof *head);
	memcpy(body, request + sizeof *head, sizeof *body);
	return head->opcode == FUSE_WRITE && !(body->write_flags & WRITE_CACHE);
}

ssize_t held_data_shorten(char *request, ssize_t size)
{
	struct in_header head;
	struct write_in body;

	if (!is_long(request, (size_t)size, &head, &body) || may_hold_more(head.uid))
		return size;
	head.len = BEFORE_DATA + PAGE;
	body.size = PAGE;
	memcpy(request, &head, sizeof head);
	memcpy(request + sizeof head, &body, sizeof body);
	return head.len;
}

uint32_t held_data_take(const char *request, size_t size)
{
	struct in_header head;
	struct write_in body;

	if (!is_long(request, size, &head, &body))
		return 0;
	left -= body.size;
	held[head.uid % USERS] += body.size;
	return body.size;
}

void held_data_give_back(uint32_t uid, uint32_t bytes)
{
	left += bytes;
	held[uid % USERS] -= bytes;
}
