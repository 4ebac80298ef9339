//! The host's side of a pod's veth pair.

use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkMessage};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::ipam::{Lease, LiveLink, alias, alias_addresses};
use crate::own;
use crate::reconcile::ReconcileError;
use crate::reconcile::netlink::{Netlink, describe, errno, settle};

/// MAC of every host end: pods have it as their gateway's permanent neighbour.
pub(super) const HOST_MAC: [u8; 6] = [0xee; 6];

/// All interfaces with a name of ours.
pub(super) async fn own(netlink: &Netlink) -> Result<Vec<LiveLink>, ReconcileError> {
    let dump = netlink.dump("links", netlink.handle().link().get().execute()).await?;
    Ok(dump.iter().filter_map(live).collect())
}

fn live(message: &LinkMessage) -> Option<LiveLink> {
    let name = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    let addresses = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => alias_addresses(alias),
        _ => None,
    });
    own::is_veth(&name).then_some(LiveLink { name, ifindex: message.header.index, addresses })
}

/// Makes the pair: the host's end here and down, the pod's end in `netns`. Returns the host end's index.
pub(super) async fn create(
    netlink: &Netlink,
    lease: &Lease,
    mtu: u32,
    netns: BorrowedFd<'_>,
) -> Result<u32, ReconcileError> {
    let object = format!("link {}", lease.host_interface);
    let pod_end = LinkUnspec::new_with_name(&lease.ifname)
        .address(lease.pod_mac.to_vec())
        .mtu(mtu)
        .setns_by_fd(netns.as_raw_fd())
        .build();
    let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(lease.host_interface.clone())
        .address(HOST_MAC.to_vec())
        .mtu(mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(pod_end)))
        .build();
    if let Err(error) = netlink.handle().link().add(pair).execute().await {
        let what = format!("{} in the pod's network namespace", lease.ifname);
        let text = match errno(&error) {
            Some(libc::EEXIST) => format!("{what}, or this name here, exists already"),
            _ => describe(&error),
        };
        return Err(ReconcileError::new(object, text));
    }
    let index = index_of(netlink, &lease.host_interface).await?;
    let index = index.ok_or_else(|| ReconcileError::new(&object, "vanished as soon as it was made"))?;
    set_alias(netlink, index, &lease.ips, &object).await?;
    for (key, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("autoconf", "0")] {
        super::netns::sysctl("ipv6", &lease.host_interface, key, value)
            .map_err(|error| ReconcileError::new(&object, error))?;
    }
    Ok(index)
}

async fn set_alias(
    netlink: &Netlink,
    index: u32,
    ips: &[IpAddr],
    object: &str,
) -> Result<(), ReconcileError> {
    let message = LinkUnspec::new_with_index(index).alias(alias(ips)).build();
    settle(netlink.handle().link().set(message).execute().await, &[], object)
}

/// Lets packets in: only after policy is attached.
pub(super) async fn up(netlink: &Netlink, name: &str, index: u32) -> Result<(), ReconcileError> {
    let message = LinkUnspec::new_with_index(index).up().build();
    settle(netlink.handle().link().set(message).execute().await, &[], format!("link {name}"))
}

/// Deletes the pair; absent is success. On success it is gone.
pub(super) async fn delete(netlink: &Netlink, name: &str) -> Result<(), ReconcileError> {
    match index_of(netlink, name).await? {
        Some(index) => {
            let deleted = netlink.handle().link().del(index).execute().await;
            settle(deleted, &[libc::ENODEV], format!("link {name}"))
        }
        None => Ok(()),
    }
}

/// Index by name; `None` if there is no such link.
pub(super) async fn index_of(netlink: &Netlink, name: &str) -> Result<Option<u32>, ReconcileError> {
    use futures::TryStreamExt as _;
    let mut found = std::pin::pin!(netlink.handle().link().get().match_name(name).execute());
    match found.try_next().await {
        Ok(message) => Ok(message.map(|message| message.header.index)),
        Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(ReconcileError::new(format!("link {name}"), describe(&error))),
    }
}
