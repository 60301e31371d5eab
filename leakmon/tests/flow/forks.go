// Forks starts goroutines, and processes that start goroutines: some of another program, some of its own.
package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"sync"
)

func work(done *sync.WaitGroup) { done.Done() }

func spawn(count int) {
	var done sync.WaitGroup
	done.Add(count)
	for i := 0; i < count; i++ {
		go work(&done)
	}
	done.Wait()
}

func main() {
	if len(os.Args) > 1 {
		spawn(1000)
		return
	}
	fmt.Println("ready", os.Getpid())
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		for i := 0; i < 10; i++ {
			spawn(100)
			if err := exec.Command("/bin/true").Run(); err != nil {
				panic(err)
			}
			if err := exec.Command(os.Args[0], "child").Run(); err != nil {
				panic(err)
			}
		}
		fmt.Println("done")
	}
}
