//! A container of a DaemonSet on a host of the lab, without a runtime: a root of its own that is read-only, the volumes that the
//! manifest mounts and no others, and the capabilities that it adds. What stays out are seccomp, AppArmor, SELinux and the
//! runtime's list of devices.

use std::fmt::Write as _;

use netns_tests::host::Host;
use serde_json::Value;

/// A pod of a DaemonSet on a host.
pub struct Pod<'a> {
    pub host: &'a Host,
    pub set: &'a Value,
    /// Two pods of one set differ in it.
    pub name: &'a str,
}

impl Pod<'_> {
    fn container(&self, name: &str) -> &Value {
        let spec = &self.set["spec"]["template"]["spec"];
        let lists = ["initContainers", "containers"].map(|list| spec[list].as_array());
        let mut all = lists.into_iter().flatten().flatten();
        all.find(|container| container["name"] == name).unwrap_or_else(|| panic!("no container {name}"))
    }

    /// Starts a container, as a kubelet would: again whenever it ends.
    pub fn start(&self, container: &str) {
        let of = self.container(container);
        let command = [words(&of["command"]), words(&of["args"])].concat();
        let argv = self.argv(of, &command);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        self.host.start_unit(&self.unit(container), &argv).unwrap();
    }

    /// Runs an init container to its end.
    pub fn run(&self, container: &str) -> anyhow::Result<String> {
        let of = self.container(container);
        let command = [words(&of["command"]), words(&of["args"])].concat();
        self.exec(of, &command)
    }

    /// Its readiness probe, if that is a program.
    pub fn is_ready(&self, container: &str) -> anyhow::Result<String> {
        let of = self.container(container);
        self.exec(of, &words(&of["readinessProbe"]["exec"]["command"]))
    }

    fn exec(&self, container: &Value, command: &[String]) -> anyhow::Result<String> {
        let argv = self.argv(container, command);
        self.host.run(&argv.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The unit that a container is here.
    pub fn unit(&self, container: &str) -> String {
        format!("{}-{container}", self.name)
    }

    fn argv(&self, container: &Value, command: &[String]) -> Vec<String> {
        let security = &container["securityContext"];
        assert_eq!(security["readOnlyRootFilesystem"], Value::Bool(true));
        assert_eq!(security["allowPrivilegeEscalation"], Value::Bool(false));
        let added = words(&security["capabilities"]["add"]);
        let capabilities: String =
            added.iter().map(|name| format!(",+{}", name.to_lowercase())).collect::<String>();
        let mut script = ROOT.replace("PROGRAMS", &self.host.bins().dir.to_string_lossy());
        for mount in container["volumeMounts"].as_array().into_iter().flatten() {
            let at = mount["mountPath"].as_str().unwrap();
            let (from, is_file) = self.volume(mount["name"].as_str().unwrap());
            let make = if is_file { "touch" } else { "mkdir -p" };
            // Not made on the host: a kubelet does that, and only where the manifest says so.
            writeln!(script, "mkdir -p .$(dirname {at}); {make} .{at}; mount --bind {from} .{at}").unwrap();
            if mount["readOnly"] == Value::Bool(true) {
                writeln!(script, "mount -o remount,bind,ro .{at}").unwrap();
            }
        }
        for variable in container["env"].as_array().into_iter().flatten() {
            // The node's name is in the lab's agent.yaml.
            if let (Some(name), Some(value)) = (variable["name"].as_str(), variable["value"].as_str()) {
                writeln!(script, "export {name}={value}").unwrap();
            }
        }
        script += "mount -o remount,ro .\n";
        let command: Vec<String> = command.iter().map(|word| format!("'{word}'")).collect();
        writeln!(
            script,
            "exec chroot . setpriv --no-new-privs --inh-caps=-all --bounding-set=-all{capabilities} {}",
            command.join(" ")
        )
        .unwrap();
        ["unshare", "--mount", "--", "sh", "-ec", &script].map(String::from).to_vec()
    }

    /// Where a volume's files are on the host, and whether it is a single one.
    fn volume(&self, name: &str) -> (String, bool) {
        let volumes = self.set["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
        let volume = volumes.iter().find(|volume| volume["name"] == name).unwrap();
        if let Some(path) = volume["hostPath"]["path"].as_str() {
            if volume["hostPath"]["type"] == "DirectoryOrCreate" {
                self.host.run(&["mkdir", "-p", path]).unwrap();
            }
            return (path.to_owned(), volume["hostPath"]["type"] == "CharDevice");
        }
        if let Some(map) = volume["configMap"]["name"].as_str() {
            // The lab's own configuration, or what the test put there.
            let own = if map.starts_with("mesh-agent") { "/etc/margay" } else { "/run/configmaps/mesh-cni" };
            return (own.to_owned(), false);
        }
        assert!(volume["emptyDir"].is_object(), "{volume}");
        let path = format!("/run/pods/{}/{name}", self.name);
        self.host.run(&["mkdir", "-p", &path]).unwrap();
        (path, false)
    }
}

fn words(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().map(|word| word.as_str().unwrap().to_owned()).collect()
}

/// The image: the machine's programs, and ours where the Containerfile puts them.
const ROOT: &str = "
mount --make-rprivate /
root=$(mktemp -d /run/container.XXXXXX)
mount -t tmpfs -o mode=755 tmpfs $root
cd $root
mkdir usr etc proc sys dev run var tmp host
ln -s ../run var/run
mount --rbind /usr usr
for name in bin sbin lib lib64; do
  if [ -L /$name ]; then cp -a /$name $name; elif [ -d /$name ]; then mkdir $name; mount --rbind /$name $name; fi
done
mount --bind PROGRAMS usr/local/bin
mount -t proc proc proc
mount -o bind,ro proc/sys proc/sys
mount -t sysfs -o ro sysfs sys
for name in null zero full random urandom; do touch dev/$name; mount --bind /dev/$name dev/$name; done
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin; ln -s fd/1 dev/stdout; ln -s fd/2 dev/stderr
";
