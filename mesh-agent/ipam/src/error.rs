//! Why there is no address.

use std::io;
use std::net::IpAddr;

use crate::catalogue::Refusal;
use crate::range::Family;
use crate::store::StoreError;

/// Why there is no address.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    /// The wish cannot be fulfilled, whatever is free.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Everything is taken.
    #[error("no free {0} address is left in the IPPools for this pod")]
    Exhausted(Family),
    /// An exact address that is somebody's.
    #[error("address {0} is in use by {1}")]
    InUse(IpAddr, String),
    /// An exact address of another node's block, in a pool that lends none.
    #[error("address {0} is in the block of node {1}, and the pool does not allow borrowing")]
    NotLent(IpAddr, String),
    /// The API server has not confirmed this node's addresses for too long (or since boot): somebody may have
    /// taken the node for gone.
    #[error("this node's addresses are not confirmed by the API server; no address is given until they are")]
    Unconfirmed,
    /// Others were faster, again and again.
    #[error("too many nodes want addresses at the same time; try again")]
    Contended,
    /// The store.
    #[error("IPBlock: {0}")]
    Store(#[from] StoreError),
    /// The disk.
    #[error("cannot save which addresses are this node's: {0}")]
    Ledger(#[from] io::Error),
}
