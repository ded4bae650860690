/* Caches whether the root directory has no ACL.
 *
 * For every path that a user other than the root directory's owner walks, the kernel asks for the ACL of the root
 * directory, and never caches the reply. The reason is that it makes this inode before FUSE_INIT announces ACLs, and
 * marks it with ACL_DONT_CACHE (fuse_init_inode() in fs/fuse/inode.c). Since Linux 6.18.42, 6.12.101 and 6.6.148, this
 * mark stays (forget_cached_acl() in fs/posix_acl.c). So the daemon caches that there is no ACL, until a request
 * changes attributes of the root, or a notice makes the kernel forget them.
 *
 * Requests come under the core lock, notices from any thread.
 */
#include "root_acl.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "messages.h"

enum { NOTIFY_INVAL_INODE = 2 };
enum { ROOT = 1, GETXATTR_IN = 8 };

static const char access_acl[] = "system.posix_acl_access";
static atomic_bool is_none;
static _Atomic uint64_t asked; /* the number of the request that asks; 0: none, or its reply is out of date */

void root_acl_reset(void)
{
	atomic_store(&asked, 0);
	atomic_store(&is_none, false);
}

void root_acl_received(const void *request, size_t size)
{
	struct in_header head;

	if (size < sizeof head)
		return;
	memcpy(&head, request, sizeof head);
	if (head.nodeid != ROOT)
		return;
	const char *name = (const char *)request + sizeof head + GETXATTR_IN;
	if (head.opcode == FUSE_SETATTR || head.opcode == FUSE_SETXATTR || head.opcode == FUSE_REMOVEXATTR)
		root_acl_reset();
	else if (head.opcode == FUSE_GETXATTR && size >= sizeof head + GETXATTR_IN + sizeof access_acl &&
		 !memcmp(name, access_acl, sizeof access_acl))
		atomic_store(&asked, head.unique);
}

void root_acl_sent(const struct iovec *iov, int count)
{
	struct out_header head;
	uint64_t inode;

	if (iov[0].iov_len < sizeof head)
		return;
	memcpy(&head, iov[0].iov_base, sizeof head);
	if (head.unique) {
		uint64_t number = head.unique;
		if (head.error == -ENODATA && atomic_compare_exchange_strong(&asked, &number, 0))
			atomic_store(&is_none, true);
	} else if (head.error == NOTIFY_INVAL_INODE && count > 1 && iov[1].iov_len >= sizeof inode) {
		memcpy(&inode, iov[1].iov_base, sizeof inode);
		if (inode == ROOT)
			root_acl_reset();
	}
}

bool root_acl_is_none(uint64_t inode, const char *name)
{
	return inode == ROOT && atomic_load(&is_none) && !strcmp(name, access_acl);
}
