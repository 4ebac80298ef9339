// margay-kube is Kubernetes for tests, in one program: the real etcd, kube-apiserver, kube-proxy and kubectl, each by its
// own name (a link to this program) or as the first argument. What they do and which flags they take is theirs.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/server/v3/etcdmain"
	_ "k8s.io/client-go/plugin/pkg/client/auth"
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
)

// source is the hash of what this program was built from (.ci/peers).
var source = "unknown"

var calls = map[string]func(){
	"etcd":           func() { etcdmain.Main(os.Args) },
	"kube-apiserver": func() { os.Exit(cli.Run(apiserver.NewAPIServerCommand())) },
	"kube-proxy":     func() { os.Exit(cli.Run(proxy.NewProxyCommand())) },
	"kubectl":        kubectl,
}

// Verbosity counts before flags are parsed, for kubectl looks for plugins and preferences while it builds its commands.
func kubectl() {
	if _, err := logs.GlogSetter(cmd.GetLogVerbosity(os.Args)); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	util.CheckErr(cli.RunNoErrOutput(cmd.NewDefaultKubectlCommand()))
}

func main() {
	call, found := calls[filepath.Base(os.Args[0])]
	if !found && len(os.Args) > 1 {
		call, found = calls[os.Args[1]]
		os.Args = os.Args[1:]
	}
	if !found {
		fmt.Fprintln(os.Stderr, "usage: margay-kube etcd|kube-apiserver|kube-proxy|kubectl …\nbuilt from", source)
		os.Exit(2)
	}
	call()
}
