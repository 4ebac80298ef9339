//! The real kube-proxy on a node: Services as nftables rules of the node.

use anyhow::{Context, Result};

use super::{ADMIN_CONFIG, Cluster};
use crate::host::Host;

/// The unit.
const UNIT: &str = "kube-proxy";

impl Cluster<'_> {
    /// Starts kube-proxy on a node whose pods have addresses in these ranges.
    pub fn start_proxy(&self, node: &Host, pods: &[String]) -> Result<()> {
        self.admit(node)?;
        let program = node.bins().kubernetes(UNIT)?;
        let arguments = [
            format!("--kubeconfig={ADMIN_CONFIG}"),
            format!("--hostname-override={}", node.name()),
            "--proxy-mode=nftables".into(),
            "--detect-local-mode=ClusterCIDR".into(),
            format!("--cluster-cidr={}", pods.join(",")),
            // The machine's limits stay as they are.
            "--conntrack-max-per-core=0".into(),
            "--conntrack-tcp-timeout-established=0s".into(),
            "--conntrack-tcp-timeout-close-wait=0s".into(),
            "--conntrack-udp-timeout=0s".into(),
            "--conntrack-udp-timeout-stream=0s".into(),
            "--nodeport-addresses=primary".into(),
        ];
        let mut argv = vec![program.to_str().context("path of kube-proxy")?];
        argv.extend(arguments.iter().map(String::as_str));
        node.start_unit(UNIT, &argv)
    }
}
