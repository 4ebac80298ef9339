//! Names and paths that several programs must agree on.

/// The agent's configuration file.
pub const CONFIG: &str = "/etc/margay/agent.yaml";
/// The manifest directory of the file source.
pub const MANIFESTS: &str = "/etc/margay/manifests";
/// Keys, IPAM journal, incumbents.
pub const STATE_DIR: &str = "/var/lib/margay";
/// Sockets.
pub const RUN_DIR: &str = "/run/margay";
/// In the run directory: one JSON line each way, for mesh-cni; root only.
pub const CNI_SOCKET: &str = "cni.sock";
/// In the run directory: HTTP, everything, root only.
pub const CONTROL_SOCKET: &str = "control.sock";
/// In the run directory: HTTP, reads only, group `margay`.
pub const STATUS_SOCKET: &str = "status.sock";
/// Health and Prometheus metrics.
pub const METRICS_ADDRESS: &str = "127.0.0.1:9475";
/// The WireGuard device of a new node.
pub const DEVICE: &str = DEVICES[0];
/// The WireGuard devices. The key of epoch `e` is in device `e % 2`, so that an old and a new key live side by side.
pub const DEVICES: [&str; 2] = ["margay0", "margay1"];
/// UDP port of the first; the second's is the next.
pub const PORT: u16 = 51820;
/// Its MTU until the path's is found: 1500 less IPv6 + UDP + WireGuard overhead (40 + 8 + 32).
pub const MTU: u32 = 1420;
/// Where WireGuard's UAPI sockets live.
pub const UAPI_DIR: &str = "/var/run/wireguard";
/// BPF pins.
pub const BPF_DIR: &str = "/sys/fs/bpf/margay";
/// Prefix of a pod's host-side veth; ten hex digits follow.
pub const VETH_PREFIX: &str = "mgy";
/// Our routes, and the table of routes only pod-sourced traffic sees.
pub const TABLE: u32 = 4207;
/// Routes for traffic with a pod's source address: remote nodes' own addresses.
pub const TABLE_FROM_PODS: u32 = 4208;
/// Route protocol number that marks a route as ours.
pub const ROUTE_PROTOCOL: u8 = 142;
/// First of our ten rule priorities.
pub const RULE_PRIORITY: u32 = 30000;
/// Bit in the packet mark that is ours.
pub const FWMARK: u32 = 0x2000;
