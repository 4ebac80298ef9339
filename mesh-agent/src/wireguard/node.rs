//! The devices of this node, each driven by what its link is: kernel WireGuard over netlink, all else by its UAPI socket.

use futures::future::BoxFuture;
use mesh_uapi::{Device, Op, Stats};

use super::kernel::Kernel;
use super::{Datapath, DatapathError, Datapaths, UserspaceDatapaths};
use crate::reconcile::netlink::{Netlink, WIREGUARD};

/// Both kinds of devices.
#[derive(Debug, Clone)]
pub struct NodeDatapaths {
    netlink: Netlink,
    kernel: Kernel,
    userspace: UserspaceDatapaths,
}

impl NodeDatapaths {
    /// In the network namespace of `netlink`, with the sockets in their usual place.
    pub fn new(netlink: Netlink) -> Self {
        Self { netlink, kernel: Kernel::new(), userspace: UserspaceDatapaths::default() }
    }
}

impl Datapaths for NodeDatapaths {
    fn open(&self, name: &str) -> Box<dyn Datapath> {
        Box::new(NodeDatapath { name: name.to_owned(), all: self.clone() })
    }

    /// Those behind a socket. A kernel device that nobody wants is deleted with its link, and until then it carries what
    /// is still routed there.
    fn names(&self) -> Vec<String> {
        self.userspace.names()
    }
}

/// One device, of whichever kind it is at the moment.
struct NodeDatapath {
    name: String,
    all: NodeDatapaths,
}

impl NodeDatapath {
    async fn inner(&self) -> Result<Box<dyn Datapath>, DatapathError> {
        let link = self.all.netlink.link(&self.name).await;
        let link = link.map_err(|error| DatapathError::Failed(error.to_string()))?;
        Ok(match link.is_some_and(|link| link.kind == WIREGUARD) {
            true => Box::new(self.all.kernel.open(&self.name)),
            false => self.all.userspace.open(&self.name),
        })
    }
}

impl Datapath for NodeDatapath {
    fn read(&self) -> BoxFuture<'_, Result<Device, DatapathError>> {
        Box::pin(async { self.inner().await?.read().await })
    }

    fn apply(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<(), DatapathError>> {
        Box::pin(async { self.inner().await?.apply(ops).await })
    }

    fn stats(&self) -> BoxFuture<'_, Result<Option<Stats>, DatapathError>> {
        Box::pin(async { self.inner().await?.stats().await })
    }
}
