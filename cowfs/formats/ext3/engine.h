/*
 * An ext3 filesystem in a file, read and written in-process, crash-safe by its own journal.
 *
 * Every function takes the image's lock and may be called from any thread. Unless said otherwise it
 * returns 0 or more when it succeeded and -errno when it did not. Names are bytes, not terminated; a
 * directory's names are known to the caller, who looks them up itself (x3_readdir): nothing here
 * checks whether a name is there already, nor whether a directory is moved below itself.
 *
 * A function that changes something is one atomic operation: when it fails, nothing has happened
 * (x3_write may have written a part, and says how much), and after a crash it happened or it did not,
 * in the order of the calls. What may fail with any of them: ENOSPC, ENOMEM; EROFS when the image was
 * opened for reading or has been aborted; EIO and EUCLEAN (the image is damaged), which abort it, as
 * errors=remount-ro does: nothing more is written but the mark of a damage, reads go on from memory, x3_facts and x3_message
 * tell. EUCLEAN from a function that reads aborts nothing.
 *
 * The disk that the image is on may be full (ENOSPC, EDQUOT, EFBIG): then what needs a block there fails
 * with that. If a commit is refused, which hardly happens (see host_space.c), or fdatasync, by EIO too, the image is
 * stalled: what was done is in memory, all that waits for it to be on disk, and all changes, fail with that
 * errno, and it is tried again by the next call, but at most each second. Once it succeeds all goes on.
 *
 * This file is read by cffi as well (build_engine.py): plain declarations and integer #defines alone.
 */
#pragma once
#include <stdint.h>

typedef struct x3_image x3_image;

/* x3_open: flags */
#define X3_READ_ONLY 1

/* x3_open: debug. Each bit leaves out one rule of the journal, so that tests can show what the rule is for. */
#define X3_NO_HOLD 1     /* freed blocks are reusable at once */
#define X3_NO_FORGET 2   /* blocks that are in the log still become data without a checkpoint */
#define X3_NO_BARRIER 4  /* no barrier before the commit record */
#define X3_NO_ORPHANS 8  /* no orphan list */
#define X3_NO_MEMORY 32  /* no rule: as if there were none for data that the disk has refused */
#define X3_AS_NFS 64     /* no rule: as if the image were on NFS */
#define X3_GIVE_BACK 128 /* no rule: as if the image were sparse */
#define X3_EARLY 256     /* freed blocks become holes before their transaction is on disk */
#define X3_OTHER_BOOT 16 /* no rule: as if the machine had been started anew since the image was last open */

/* x3_inject: kind */
#define X3_PWRITE 1
#define X3_FDATASYNC 2
#define X3_PREAD 3
#define X3_FALLOCATE 4 /* room on the disk for a block */

/* The trace: little-endian records of u64 kind, u64 offset, u64 length, then length bytes. */
#define X3_TRACE_WRITE 1   /* a write was done: the image has these bytes at offset */
#define X3_TRACE_BARRIER 2 /* fdatasync returned; offset: its number */
#define X3_TRACE_MARK 3    /* x3_mark; offset: its argument */
#define X3_TRACE_BEGUN \
	4                 /* fdatasync is about to begin; offset: its number. What was written before
                              is on disk when the record X3_TRACE_BARRIER of that number is there. */
#define X3_TRACE_FAILED 5 /* it failed: what was written since the last that did not may never get to the disk */

/* x3_setattr: what to set */
#define X3_MODE 1
#define X3_UID 2
#define X3_GID 4
#define X3_ATIME 8
#define X3_MTIME 16

/* x3_rename: flags */
#define X3_EXCHANGE 1 /* swap the two names */
#define X3_WHITEOUT 2 /* leave a character device 0:0 at the source */
#define X3_KEEP 4     /* what is replaced is in use: x3_release frees it */

#define X3_LINK_MAX 65000 /* names of a file, and subdirectories + 2 of a directory, as in fs/ext4; then EMLINK */

/*
 * The attributes of an inode. Times: nanoseconds since the epoch, from 1901 to 2446; from 2262 on less 2^64, so what
 * is before 1901 is after 2262.
 */
struct x3_attr {
	uint32_t mode, nlink, uid, gid;
	uint32_t major, minor; /* of a device */
	uint32_t generation;   /* the other half of the kernel's file handle */
	uint32_t flags;        /* i_flags as on disk */
	uint64_t size;
	uint64_t blocks; /* of 512 bytes */
	int64_t atime_ns, mtime_ns, ctime_ns;
};

/* What is known about the whole image. */
struct x3_facts {
	uint32_t block_size, inode_size;
	uint32_t compat, incompat, ro_compat; /* the feature bits, as they were at open */
	uint32_t state;                       /* s_state at open: 1 clean, 2 errors were found */
	uint64_t blocks, free_blocks;         /* free: those still held back count as free */
	uint64_t reserved;                    /* of the free ones, for root by the superblock */
	uint64_t overhead;                    /* blocks that statfs does not count in f_blocks */
	uint32_t inodes, free_inodes;
	uint32_t journal_blocks, journal_used;
	uint32_t tid, committed;     /* the running transaction, and the last one on disk */
	uint32_t aborted;            /* errno of what aborted it, or 0 */
	uint32_t dirty;              /* metadata blocks in the running transaction */
	uint32_t stalled;            /* errno of what the disk lacks, or 0 */
	uint32_t unsaved;            /* blocks of metadata, and of refused data, that are in memory alone */
	int64_t saved_ns;            /* when all was on disk last: since the epoch */
	uint64_t missing, disk_free; /* bytes that the file lacks of its blocks, and that its disk has free */
	uint64_t cached, held;       /* blocks in the cache; free blocks that wait for commit or checkpoint */
	uint64_t cache_hits,
		cache_misses; /* metadata blocks that were there when they were needed, and that were not */
	uint64_t commits, checkpoints, barriers, bytes_written; /* since open */
	uint64_t replayed, redone; /* transactions of the journal and records of the redo log that it took to open it */
	uint8_t uuid[16];
};

/* Where a name stands in its directory: logical block, and offset within it. */
struct x3_place {
	uint32_t block, offset;
};

/* What x3_create makes, and what became of it. */
struct x3_new {
	/* in */
	uint32_t mode, uid, gid; /* the mode with its type */
	uint32_t major, minor;   /* of a device */
	const char *target;      /* of a symlink */
	uint32_t target_len;
	const char *attrs;   /* extended attributes: of each two numbers of 32 bits, the lengths of name and value, */
	uint64_t attrs_size; /* and then these */
	/* out */
	uint32_t ino;
	struct x3_place place;
	struct x3_attr attr;
};

/* A regular file that x3_copy makes, with all that it has. */
struct x3_copy {
	/* in */
	uint32_t mode, uid, gid;
	int64_t atime_ns, mtime_ns;
	const char *data;
	uint64_t size;
	const char *attrs; /* as in x3_new */
	uint64_t attrs_size;
	/* out */
	uint32_t ino;
	struct x3_place place;
};

struct x3_rename {
	/* in */
	uint32_t source_dir, target_dir;
	const char *source_name, *target_name;
	uint32_t source_len, target_len;
	struct x3_place source_place;
	struct x3_place target_place; /* if something is replaced or exchanged */
	uint32_t ino;                 /* what is moved */
	uint32_t replaced;            /* what stands at the target, 0 for nothing */
	uint32_t hint;                /* if nothing does: as for x3_create */
	uint32_t flags;               /* X3_EXCHANGE, X3_WHITEOUT, X3_KEEP */
	uint32_t uid, gid;            /* of the whiteout */
	/* out */
	struct x3_place place; /* of the target's name now; the source's stays where it was, if it stays */
	uint32_t whiteout;     /* the inode of the whiteout, or 0 */
};


/* --- opening and closing --- */

/*
 * Open the image behind *fd*, which is duplicated, and let *out* be it.
 *
 * The cache holds about *cache_bytes* (0: 64 MiB) of metadata; file data is left to the page cache.
 * *trace_fd* (duplicated as well) gets a record of every write and barrier, -1 for none; *debug* is 0
 * but in tests.
 *
 * What a crash has left in the journal is part of the filesystem, whatever its flag needs_recovery says: for
 * reading it is taken from there, and nothing is written; to write, it is written home first, and inodes that were
 * left on the orphan list are dealt with. (Not if the filesystem was mounted since by who left the journal alone:
 * then the log is emptied.)
 *
 * EOPNOTSUPP: a feature that is not ext3's, or no journal inside. EINVAL: no ext filesystem, or its
 * superblock makes no sense. EBADMSG: the journal or the orphan list is damaged. When it fails,
 * x3_message(NULL) says why, in the same thread.
 */
int x3_open(int fd, uint32_t flags, uint64_t cache_bytes, int trace_fd, uint32_t debug, x3_image **out);

/*
 * Commit, free what is on the orphan list, write everything home, and mark the filesystem clean.
 *
 * Frees the image whatever it returns; no other thread may be using it.
 */
int x3_close(x3_image *img);

/* Free the image and write nothing, as if the process had died. No other thread may be using it. */
void x3_abandon(x3_image *img);

int x3_facts(x3_image *img, struct x3_facts *out);

/* The inodes whose data the disk has refused, and nobody has any more: up to *room* of them; return how many. */
uint32_t x3_lost(x3_image *img, uint32_t *inodes, uint32_t room);

/* What aborted the image, or what was wrong last, in a sentence. Valid until the next call. NULL: see x3_open. */
const char *x3_message(x3_image *img);


/* --- inodes --- */

/* ESTALE: there is no such inode in use. */
int x3_getattr(x3_image *img, uint32_t ino, struct x3_attr *out);

/*
 * The same for what a name in *dir* leads to. EUCLEAN for a directory whose ".." is another one: a directory is in
 * one place, or a walk through the tree would have no end.
 */
int x3_child(x3_image *img, uint32_t dir, uint32_t ino, struct x3_attr *out);

/*
 * Set the fields of *attr* that the bits of *what* name, and the ctime to now.
 *
 * Of the mode only the lowest 12 bits count. Times beyond what the inode can hold are clamped.
 */
int x3_setattr(x3_image *img, uint32_t ino, uint32_t what, const struct x3_attr *attr);
/* Note that it was read now: if the kernel did with relatime, or *always*. */
int x3_was_read(x3_image *img, uint32_t ino, int always);

/*
 * Set the flags of chattr(1), those in i_flags that can be set, as FS_IOC_SETFLAGS of the kernel's ext3 does: EOPNOTSUPP
 * for what ext3 has not, EINVAL for extents; those of the engine's own stay as they are. Who may do so, and what
 * they forbid, is for the caller to see to.
 */
int x3_setflags(x3_image *img, uint32_t ino, uint32_t flags);

/* When it was made: 1 and *ns*, or 0 if it has no room for that, as inodes of 128 bytes. */
int x3_birth(x3_image *img, uint32_t ino, int64_t *ns);

/* Copy the target into *buf* and return its length; ERANGE if *cap* is less, EINVAL for no symlink. */
int64_t x3_readlink(x3_image *img, uint32_t ino, void *buf, uint64_t cap);


/* --- directories --- */

/*
 * Fill *buf* with the names of the next blocks of *dir*, of whole blocks only; return the bytes filled.
 *
 * *cursor* is the block to begin at, 0 at first, and is moved on; 0 bytes: that was all. Each name is
 * u32 ino, u32 block, u16 offset, u8 type (of the directory entry, EXT2_FT_*, 0 for unknown), u8
 * length, and the name itself, without padding, little-endian; "." and ".." are left out. ERANGE: *cap*
 * is less than four times the block size. ENOTDIR.
 */
int64_t x3_readdir(x3_image *img, uint32_t dir, uint64_t *cursor, void *buf, uint64_t cap);

/* What x3_lookup finds. */
struct x3_found {
	uint32_t ino, type; /* type: of the directory entry, EXT2_FT_*, 0 for unknown */
	struct x3_place place;
};

/*
 * Find a name by the directory's index, without reading the rest: 1 if it is there, 0 if not. ENOTDIR; EFBIG for
 * a directory of more than 64 MiB without an index.
 */
int x3_lookup(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_found *out);

/* The directory that *dir* is in, by its "..": an inode number. ENOTDIR. */
int64_t x3_parent(x3_image *img, uint32_t dir);

/*
 * Whether *ino* is *dir*, or above it by "..": 0 or 1. EUCLEAN if the way up does not come to the root; at most
 * twice as many steps as there are directories on it.
 */
int x3_is_above(x3_image *img, uint32_t ino, uint32_t dir);

/*
 * Make an inode of any type, directories included, and give it a name in *dir*.
 *
 * *hint* is the first block of *dir* where room for the name is looked for: the place of the last new
 * name, or of a removed one before that; 0 looks everywhere. (An indexed directory needs no hint.)
 * EMLINK, ENAMETOOLONG for names beyond 255 and targets that do not fit a block. x3_new says the rest.
 */
int x3_create(x3_image *img, uint32_t dir, const char *name, uint32_t len, uint32_t hint, struct x3_new *new_inode);

/*
 * Make a regular file that is complete from the beginning, whatever becomes of us, and give it a name in *dir*, whose
 * mtime stays as it is. It inherits nothing. *hint* is as for x3_create.
 */
int x3_copy(x3_image *img, uint32_t dir, const char *name, uint32_t len, uint32_t hint, struct x3_copy *copy);

/*
 * Give *ino* one more name. EMLINK; EPERM for a directory.
 *
 * An orphan that was kept, be it a directory, gets its first name back, and is no orphan any more.
 */
int x3_link(x3_image *img, uint32_t ino, uint32_t dir, const char *name, uint32_t len, uint32_t hint,
	    struct x3_place *place);

/*
 * Remove the name of *ino* that stands at *where*.
 *
 * If the name has moved (an index may have split its block), it is searched for. With the last name
 * the inode goes too, unless *keep*: then it lives on, on the orphan list, until x3_release (or
 * x3_close, or the recovery after a crash). Return 1 in that case, else 0. ENOENT; EISDIR.
 */
int x3_unlink(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_place where, uint32_t ino,
	      int keep);

/* The same for an empty directory. ENOTEMPTY; ENOTDIR. */
int x3_rmdir(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_place where, uint32_t ino,
	     int keep);

/*
 * Move a name, as renameat2(2) does.
 *
 * What is replaced must be of a fitting type (EISDIR, ENOTDIR) and empty (ENOTEMPTY). Source and
 * target must differ, and not be names of one inode. Return 1 if what was replaced lives on as an orphan.
 */
int x3_rename(x3_image *img, struct x3_rename *how);

/* Nobody uses *ino* any more: if its last name is gone, free it. Otherwise nothing happens. */
int x3_release(x3_image *img, uint32_t ino);


/* --- the data of regular files --- */

/* Read up to *len* bytes at *off*; fewer at the end of the file alone. The atime is left alone. */
int64_t x3_read(x3_image *img, uint32_t ino, void *buf, uint64_t len, uint64_t off);

/*
 * Write *len* bytes at *off*, and return how many were written: fewer when the room ended there.
 *
 * The data is in the page cache of the image's file then, and on disk before any commit that makes it
 * part of the file. EFBIG, ENOSPC when nothing was written.
 */
int64_t x3_write(x3_image *img, uint32_t ino, const void *buf, uint64_t len, uint64_t off);

/*
 * Write to those blocks of a range that are holes, and leave the others, the size and the times as they are.
 *
 * *off* is a multiple of the block size; what *len* lacks of the last block is zero. What is behind the end of the
 * file is left out. Each block has its whole new content, on disk too, or is still a hole. Returns and fails
 * as x3_write.
 */
int64_t x3_fill(x3_image *img, uint32_t ino, const void *buf, uint64_t len, uint64_t off);

/* Set the size in bytes. EFBIG. A big file's blocks are freed in several transactions; a crash finishes it. */
int x3_truncate(x3_image *img, uint32_t ino, uint64_t size);

/*
 * Let a range be a hole, as fallocate(2) with FALLOC_FL_PUNCH_HOLE: its blocks are freed, other bytes are zero. The size
 * stays. A large range in several transactions: after a crash a part of it is a hole, and the rest as it was.
 */
int x3_punch(x3_image *img, uint32_t ino, uint64_t off, uint64_t len);

/* The size that no file of this image can exceed. */
uint64_t x3_size_max(const x3_image *img);

/*
 * The next run of data at or behind *from*: return its start, and let *stop* be its end, or a place where to ask
 * again if there are very many pieces. ENXIO if there is none.
 */
int64_t x3_segment(x3_image *img, uint32_t ino, uint64_t from, uint64_t *stop);


/* --- extended attributes: full names (user.x, trusted.x, security.x, system.posix_acl_*) as xattr(7) --- */

/* Copy the names, each ended by a NUL, into *buf*; return the bytes. With *cap* 0 only count. ERANGE. */
int64_t x3_listxattr(x3_image *img, uint32_t ino, void *buf, uint64_t cap);

/* Copy the value into *buf* and return its length. With *cap* 0 only tell the length. ENODATA, ERANGE, EOPNOTSUPP. */
int64_t x3_getxattr(x3_image *img, uint32_t ino, const char *name, uint32_t len, void *buf, uint64_t cap);

/*
 * Set an attribute; *flags*: 1 XATTR_CREATE (EEXIST), 2 XATTR_REPLACE (ENODATA).
 *
 * ENOSPC: all of them together do not fit the inode and one block. EOPNOTSUPP: an unknown namespace.
 * ERANGE: a name beyond 255 bytes. EINVAL: nothing behind the namespace, or no valid ACL. The mode is not changed by an ACL.
 */
int x3_setxattr(x3_image *img, uint32_t ino, const char *name, uint32_t len, const void *value, uint64_t size,
		int flags);

/* ENODATA. */
int x3_removexattr(x3_image *img, uint32_t ino, const char *name, uint32_t len);


/* --- durability --- */

/*
 * Return when *ino*, its data and the names it has got, is on disk. Blocks.
 *
 * Without uncommitted changes of the inode (with *datasync*: changes but of its times) this is
 * one fdatasync of the image, otherwise a commit, shared with all who wait at the same time; both, if the data was
 * written while that commit was under way.
 */
int x3_fsync(x3_image *img, uint32_t ino, int datasync);

/* Return when everything that happened before is on disk. Blocks; operations go on meanwhile. */
int x3_commit(x3_image *img);

/*
 * Whether this thread is in a hurry, with whatever image: its operations do not wait for a commit that lets freed
 * blocks be used, but fail with EAGAIN. Then, and before a change when *x3_pressed() is not 0, another thread shall
 * call x3_relieve() (*for_blocks*: after an EAGAIN), which blocks, before it is tried again.
 */
int x3_hurry(int on); /* whether it was */
const volatile uint32_t *x3_pressed(x3_image *img);
int x3_relieve(x3_image *img, int for_blocks);

/* Commit, and write home what is in the journal: it is empty then, unless others write. Blocks. */
int x3_checkpoint(x3_image *img);

/* Give back the memory of what the cache can read again. */
void x3_shrink(x3_image *img);

/* Whether there is something to commit: 0 or 1. */
int x3_dirty(x3_image *img);

/*
 * Wait until it is time to commit: *ms* milliseconds, or less if the room of something that a commit frees
 * comes to an end.
 * Return whether there is something to commit. x3_wake ends one wait at once, be it the next.
 */
int x3_wait(x3_image *img, int64_t ms);
void x3_wake(x3_image *img);

/*
 * Between these two calls no transaction ends, so that all changes in between, of whatever thread, come
 * to disk together or not at all. They may be nested. Keep it short: a few changes. The thread must not
 * call what waits for a commit in between, and ENOSPC may come sooner.
 */
void x3_begin(x3_image *img);
void x3_end(x3_image *img);

/*
 * Mark the filesystem clean and let go of it, so that others may change it: grow it, say.
 *
 * All other calls wait, in whatever thread, until x3_resume, which reads it anew (from *fd*, which is
 * duplicated, unless it is -1). Kept orphans stay on the orphan list: give them names before, if they
 * are to survive e2fsck. When x3_resume fails (as x3_open), every call will give EIO.
 */
int x3_suspend(x3_image *img);
int x3_resume(x3_image *img, int fd);

/*
 * Remember from now on, or no more, which MiB of the image's file are written to.
 *
 * Copy the numbers of some that were since the last call into *units*, which has room for *cap*, 64 at least; they are
 * forgotten, so read them after that. Return how many; 0: there are no others. EFBIG for what no ext3 of common blocks
 * has.
 */
int x3_track(x3_image *img, int on);
int64_t x3_tracked(x3_image *img, uint32_t *units, uint64_t cap);

/*
 * Go on with another descriptor (it is duplicated).
 *
 * It must hold the same bytes: copied after a x3_checkpoint, and nothing changed since (EBUSY if
 * something did).
 */
int x3_switch(x3_image *img, int fd);


/* --- for tests --- */

/* Write a X3_TRACE_MARK record with the number *n*. */
int x3_mark(x3_image *img, uint64_t n);

/*
 * Let the *nth* (1: the next) system call of *kind* on the image answer *error*, once or, if *sticky*,
 * from then on. 0 ends it. Without an *error* that call waits for the next x3_inject; fdatasync has begun then.
 */
int x3_inject(x3_image *img, int kind, int64_t nth, int error, int sticky);
